"""A guest of 512 bytes: says 64 bytes on COM1 as soon as it runs, then answers every byte with the same.

Assembled by hand, so that nothing but these lines has to be believed.
"""

from __future__ import annotations

GREETING = bytes(range(64))

_CODE = """
    ba fb 03   b0 80   ee       mov dx, 3FB / mov al, 80 / out dx, al     divisor latch on
    ba f8 03   b0 01   ee       mov dx, 3F8 / mov al, 1 / out dx, al      115200 baud
    42         b0 00   ee       inc dx / mov al, 0 / out dx, al
    ba fb 03   b0 03   ee       mov dx, 3FB / mov al, 3 / out dx, al      8N1
    4a         b0 07   ee       dec dx / mov al, 7 / out dx, al           FIFOs on and empty
    ba fc 03   b0 03   ee       mov dx, 3FC / mov al, 3 / out dx, al      DTR and RTS
    31 db                       xor bx, bx
    88 d8                       mov al, bl                                greet:
    e8 18 00                    call send
    fe c3                       inc bl
    80 fb 40                    cmp bl, 64
    72 f4                       jb greet
    ba fd 03                    mov dx, 3FD                               echo:
    ec                          in al, dx
    a8 01                       test al, 1                                a byte is there
    74 fb                       jz back to the in
    ba f8 03                    mov dx, 3F8
    ec                          in al, dx
    e8 02 00                    call send
    eb ef                       jmp echo
    50                          push ax                                   send:
    ba fd 03                    mov dx, 3FD
    ec                          in al, dx
    a8 20                       test al, 20                               the transmitter is free
    74 fb                       jz back to the in
    ba f8 03                    mov dx, 3F8
    58                          pop ax
    ee                          out dx, al
    c3                          ret
"""


def boot_sector() -> bytes:
    code = b"".join(bytes.fromhex(line[4:28]) for line in _CODE.strip("\n").splitlines())
    # Two jumps are relative to where they stand: the second `call` and the first have to meet `send`.
    send = code.index(b"\x50\xba\xfd\x03")
    for at in (place for place in range(len(code)) if code[place] == 0xE8):
        assert at + 3 + int.from_bytes(code[at + 1 : at + 3], "little") == send, "call misses send"
    return code.ljust(510, b"\0") + b"\x55\xaa"
