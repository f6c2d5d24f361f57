"""The numbers of the KD protocol, and the words for them.

Every number that means something on the wire has its name here and nowhere else; docs/formats/kd.md tells
the protocol in our words.
"""

from __future__ import annotations

DATA_LEADER, CONTROL_LEADER = 0x30303030, 0x69696969
DATA_BYTE, CONTROL_BYTE = 0x30, 0x69
TRAILER = 0xAA
BREAK_IN = 0x62  # one raw byte between packets

HEADER_BYTES = 16
MAX_PAYLOAD = 4000
MAX_PACKET = HEADER_BYTES + MAX_PAYLOAD + 1

# Packet ids: each side starts at INITIAL_ID and flips bit 0 with each acknowledged packet. SYNC marks a
# target's first packet, and its first after it gave up waiting: "begin both streams anew".
INITIAL_ID = 0x80800000
SYNC = 0x800
ID_PREFIX = 0x80800000  # what all ids of a serial line begin with
ID_PREFIX_MASK = 0xFFFFF000

STATE_CHANGE32, MANIPULATE, DEBUG_IO, ACK, RESEND, RESET, STATE_CHANGE64 = 1, 2, 3, 4, 5, 6, 7
TRACE_IO, CONTROL_REQUEST, FILE_IO = 9, 10, 11  # 8 (poll break-in) never reaches the wire

DATA_TYPES = (STATE_CHANGE32, MANIPULATE, DEBUG_IO, STATE_CHANGE64, TRACE_IO, CONTROL_REQUEST, FILE_IO)
CONTROL_TYPES = (ACK, RESEND, RESET)
TYPE_NAMES = {
    STATE_CHANGE32: "StateChange32",
    MANIPULATE: "Manipulate",
    DEBUG_IO: "DebugIO",
    ACK: "ACK",
    RESEND: "RESEND",
    RESET: "RESET",
    STATE_CHANGE64: "StateChange64",
    TRACE_IO: "TraceIO",
    CONTROL_REQUEST: "ControlRequest",
    FILE_IO: "FileIO",
}

# What a state change reports. ALTERNATE is added when another source than the usual one does.
EXCEPTION, LOAD_SYMBOLS, COMMAND_STRING = 0x3030, 0x3031, 0x3032
ALTERNATE = 0x10000
STATE_NAMES = {
    EXCEPTION: "exception",
    LOAD_SYMBOLS: "load symbols",
    COMMAND_STRING: "command string",
}

# What a Manipulate packet asks for; the answer carries the same number.
READ_VIRTUAL, WRITE_VIRTUAL, GET_CONTEXT, SET_CONTEXT = 0x3130, 0x3131, 0x3132, 0x3133
WRITE_BREAKPOINT, RESTORE_BREAKPOINT, CONTINUE = 0x3134, 0x3135, 0x3136
READ_CONTROL_SPACE, WRITE_CONTROL_SPACE, READ_IO, WRITE_IO, REBOOT = 0x3137, 0x3138, 0x3139, 0x313A, 0x313B
CONTINUE2, READ_PHYSICAL, WRITE_PHYSICAL = 0x313C, 0x313D, 0x313E
GET_VERSION, WRITE_BREAKPOINT_EX, RESTORE_BREAKPOINT_EX, CAUSE_BUGCHECK = 0x3146, 0x3147, 0x3148, 0x3149
SWITCH_PROCESSOR, PAGE_IN, READ_MSR, WRITE_MSR = 0x3150, 0x3151, 0x3152, 0x3153
SEARCH_MEMORY, GET_BUS_DATA, SET_BUS_DATA = 0x3156, 0x3157, 0x3158
CLEAR_ALL_BREAKPOINTS, FILL_MEMORY, QUERY_MEMORY = 0x315A, 0x315B, 0x315C
GET_CONTEXT_EX, SET_CONTEXT_EX = 0x315F, 0x3160
API_NAMES = {
    READ_VIRTUAL: "ReadVirtualMemory",
    WRITE_VIRTUAL: "WriteVirtualMemory",
    GET_CONTEXT: "GetContext",
    SET_CONTEXT: "SetContext",
    WRITE_BREAKPOINT: "WriteBreakPoint",
    RESTORE_BREAKPOINT: "RestoreBreakPoint",
    CONTINUE: "Continue",
    READ_CONTROL_SPACE: "ReadControlSpace",
    WRITE_CONTROL_SPACE: "WriteControlSpace",
    READ_IO: "ReadIoSpace",
    WRITE_IO: "WriteIoSpace",
    REBOOT: "Reboot",
    CONTINUE2: "Continue2",
    READ_PHYSICAL: "ReadPhysicalMemory",
    WRITE_PHYSICAL: "WritePhysicalMemory",
    0x313F: "QuerySpecialCalls",
    0x3140: "SetSpecialCall",
    0x3141: "ClearSpecialCalls",
    0x3142: "SetInternalBreakPoint",
    0x3143: "GetInternalBreakPoint",
    0x3144: "ReadIoSpaceExtended",
    0x3145: "WriteIoSpaceExtended",
    GET_VERSION: "GetVersion",
    WRITE_BREAKPOINT_EX: "WriteBreakPointEx",
    RESTORE_BREAKPOINT_EX: "RestoreBreakPointEx",
    CAUSE_BUGCHECK: "CauseBugCheck",
    SWITCH_PROCESSOR: "SwitchProcessor",
    PAGE_IN: "PageIn",
    READ_MSR: "ReadMsr",
    WRITE_MSR: "WriteMsr",
    SEARCH_MEMORY: "SearchMemory",
    GET_BUS_DATA: "GetBusData",
    SET_BUS_DATA: "SetBusData",
    0x3159: "CheckLowMemory",
    CLEAR_ALL_BREAKPOINTS: "ClearAllInternalBreakpoints",
    FILL_MEMORY: "FillMemory",
    QUERY_MEMORY: "QueryMemory",
    0x315D: "SwitchPartition",
    0x315E: "WriteCustomBreakpoint",
    GET_CONTEXT_EX: "GetContextEx",
    SET_CONTEXT_EX: "SetContextEx",
}
# These set the guest going and get no answer.
RESUMING = (CONTINUE, CONTINUE2, REBOOT, CAUSE_BUGCHECK)
# This one is answered by a state change of the other processor.
ANSWERED_BY_STATE = (SWITCH_PROCESSOR,)

PRINT_STRING, GET_STRING = 0x3230, 0x3231
PRINT_TRACE = 0x3330
REQUEST_HARDWARE_BP, RELEASE_HARDWARE_BP = 0x4300, 0x4301
CREATE_FILE, READ_FILE, WRITE_FILE, CLOSE_FILE = 0x3430, 0x3431, 0x3432, 0x3433
IO_NAMES = {
    PRINT_STRING: "PrintString",
    GET_STRING: "GetString",
    PRINT_TRACE: "PrintTrace",
    REQUEST_HARDWARE_BP: "RequestHardwareBreakpoint",
    RELEASE_HARDWARE_BP: "ReleaseHardwareBreakpoint",
    CREATE_FILE: "CreateFile",
    READ_FILE: "ReadFile",
    WRITE_FILE: "WriteFile",
    CLOSE_FILE: "CloseFile",
}

STATUS_SUCCESS, STATUS_UNSUCCESSFUL, STATUS_BREAKPOINT = 0, 0xC0000001, 0x80000003
DBG_CONTINUE = 0x00010002
