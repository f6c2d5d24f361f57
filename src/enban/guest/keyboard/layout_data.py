"""What each key gives in each layout, as X keysyms.

Made by scripts/keyboard_tables.py from keycodemapdb (3-clause BSD) and xkb-data (MIT, X11).
"""

from __future__ import annotations

# A key a line: name, then the keysyms alone, with Shift, with AltGr, with both, and any others
# (behind Alt, Ctrl or Num Lock); "-" is none, missing ones at the end are left out.
COMMON = """\
esc Escape
backspace BackSpace BackSpace
tab Tab ISO_Left_Tab
ret Return
ctrl Control_L
shift Shift_L
shift_r Shift_R
kp_multiply KP_Multiply KP_Multiply KP_Multiply KP_Multiply
alt Alt_L Meta_L
f1 F1 F1 F1 F1
f2 F2 F2 F2 F2
f3 F3 F3 F3 F3
f4 F4 F4 F4 F4
f5 F5 F5 F5 F5
f6 F6 F6 F6 F6
f7 F7 F7 F7 F7
f8 F8 F8 F8 F8
f9 F9 F9 F9 F9
f10 F10 F10 F10 F10
num_lock Num_Lock
scroll_lock Scroll_Lock
kp_7 KP_Home - - - KP_7
kp_8 KP_Up - - - KP_8
kp_9 KP_Prior - - - KP_9
kp_subtract KP_Subtract KP_Subtract KP_Subtract KP_Subtract
kp_4 KP_Left - - - KP_4
kp_5 KP_Begin - - - KP_5
kp_6 KP_Right - - - KP_6
kp_add KP_Add KP_Add KP_Add KP_Add
kp_1 KP_End - - - KP_1
kp_2 KP_Down - - - KP_2
kp_3 KP_Next - - - KP_3
kp_0 KP_Insert - - - KP_0
f11 F11 F11 F11 F11
f12 F12 F12 F12 F12
katakana Katakana
hiragana Hiragana
henkan Henkan_Mode
muhenkan Muhenkan
kp_enter KP_Enter
ctrl_r Control_R
kp_divide KP_Divide KP_Divide KP_Divide KP_Divide
lf Linefeed
home Home
up Up
pgup Prior
left Left
right Right
end End
down Down
pgdn Next
insert Insert
delete Delete
audiomute XF86AudioMute
volumedown XF86AudioLowerVolume
volumeup XF86AudioRaiseVolume
power XF86PowerOff
kp_equals KP_Equal
pause Pause - - - Break
lang1 Hangul
lang2 Hangul_Hanja
meta_l Super_L
meta_r Super_R
compose Menu
stop Cancel
again Redo
props SunProps
undo Undo
front SunFront
copy XF86Copy
open XF86Open
paste XF86Paste
find Find
cut XF86Cut
help Help
menu XF86MenuKB
calculator XF86Calculator
sleep XF86Sleep
wake XF86WakeUp
mail XF86Mail
ac_bookmarks XF86Favorites
computer XF86MyComputer
ac_back XF86Back
ac_forward XF86Forward
audionext XF86AudioNext
audioplay XF86AudioPlay XF86AudioPause
audioprev XF86AudioPrev
audiostop XF86AudioStop XF86Eject
ac_home XF86HomePage
ac_refresh XF86Reload
mediaselect XF86AudioMedia
"""

LAYOUTS = {
    "ja": """\
1 1 exclam
2 2 quotedbl
3 3 numbersign
4 4 dollar
5 5 percent
6 6 ampersand
7 7 apostrophe
8 8 parenleft
9 9 parenright
0 0 asciitilde
minus minus equal
equal asciicircum asciitilde
q q Q
w w W
e e E
r r R
t t T
y y Y
u u U
i i I
o o O
p p P
bracket_left at grave
bracket_right bracketleft braceleft
a a A
s s S
d d D
f f F
g g G
h h H
j j J
k k K
l l L
semicolon semicolon plus
apostrophe colon asterisk
grave_accent Zenkaku_Hankaku - - - Kanji
backslash bracketright braceright
z z Z
x x X
c c C
v v V
b b B
n n N
m m M
comma comma less
dot period greater
slash slash question
spc space
caps_lock Eisu_toggle Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater bar brokenbar
ro backslash underscore
katakanahiragana Hiragana_Katakana - - - Romaji
print Print - - - Execute
alt_r Alt_R Meta_R
yen backslash bar
""",
    "en-us": """\
1 1 exclam
2 2 at
3 3 numbersign
4 4 dollar
5 5 percent
6 6 asciicircum
7 7 ampersand
8 8 asterisk
9 9 parenleft
0 0 parenright
minus minus underscore
equal equal plus
q q Q
w w W
e e E
r r R
t t T
y y Y
u u U
i i I
o o O
p p P
bracket_left bracketleft braceleft
bracket_right bracketright braceright
a a A
s s S
d d D
f f F
g g G
h h H
j j J
k k K
l l L
semicolon semicolon colon
apostrophe apostrophe quotedbl
grave_accent grave asciitilde
backslash backslash bar
z z Z
x x X
c c C
v v V
b b B
n n N
m m M
comma comma less
dot period greater
slash slash question
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r Alt_R Meta_R
""",
    "en-gb": """\
1 1 exclam onesuperior exclamdown
2 2 quotedbl twosuperior oneeighth
3 3 sterling threesuperior sterling
4 4 dollar EuroSign onequarter
5 5 percent onehalf threeeighths
6 6 asciicircum threequarters fiveeighths
7 7 ampersand braceleft seveneighths
8 8 asterisk bracketleft trademark
9 9 parenleft bracketright plusminus
0 0 parenright braceright degree
minus minus underscore backslash questiondown
equal equal plus dead_cedilla dead_ogonek
q q Q at Greek_OMEGA
w w W U017F section
e e E e E
r r R paragraph registered
t t T tslash Tslash
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left bracketleft braceleft dead_diaeresis dead_abovering
bracket_right bracketright braceright dead_tilde dead_macron
a a A ae AE
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon semicolon colon dead_acute dead_doubleacute
apostrophe apostrophe at dead_circumflex dead_caron
grave_accent grave notsign bar bar
backslash numbersign asciitilde dead_grave dead_breve
z z Z guillemotleft less
x x X guillemotright greater
c c C cent copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu masculine
comma comma less U2022 multiply
dot period greater periodcentered division
slash slash question dead_belowdot dead_abovedot
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less backslash bar bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "de": """\
1 1 exclam onesuperior exclamdown
2 2 quotedbl twosuperior oneeighth
3 3 section threesuperior sterling
4 4 dollar onequarter currency
5 5 percent onehalf threeeighths
6 6 ampersand notsign fiveeighths
7 7 slash braceleft seveneighths
8 8 parenleft bracketleft trademark
9 9 parenright bracketright plusminus
0 0 equal braceright degree
minus ssharp question backslash questiondown U1E9E
equal dead_acute dead_grave dead_cedilla dead_ogonek
q q Q at Greek_OMEGA
w w W U017F section
e e E EuroSign EuroSign
r r R paragraph registered
t t T tslash Tslash
y z Z leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left udiaeresis Udiaeresis dead_diaeresis dead_abovering
bracket_right plus asterisk asciitilde macron
a a A ae AE
s s S U017F U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_belowdot dead_abovedot
k k K kra ampersand
l l L lstroke Lstroke
semicolon odiaeresis Odiaeresis dead_doubleacute dead_belowdot
apostrophe adiaeresis Adiaeresis dead_circumflex dead_caron
grave_accent dead_circumflex degree U2032 U2033
backslash numbersign apostrophe rightsinglequotemark dead_breve
z y Y guillemotright U203A
x x X guillemotleft U2039
c c C cent copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu masculine
comma comma semicolon periodcentered multiply
dot period colon U2026 division
slash minus underscore endash emdash
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Separator
less less greater bar dead_belowmacron
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "de-nodeadkeys": """\
1 1 exclam onesuperior exclamdown
2 2 quotedbl twosuperior oneeighth
3 3 section threesuperior sterling
4 4 dollar onequarter currency
5 5 percent onehalf threeeighths
6 6 ampersand notsign fiveeighths
7 7 slash braceleft seveneighths
8 8 parenleft bracketleft trademark
9 9 parenright bracketright plusminus
0 0 equal braceright degree
minus ssharp question backslash questiondown U1E9E
equal acute grave cedilla cedilla
q q Q at Greek_OMEGA
w w W U017F section
e e E EuroSign EuroSign
r r R paragraph registered
t t T tslash Tslash
y z Z leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left udiaeresis Udiaeresis diaeresis diaeresis
bracket_right plus asterisk asciitilde macron
a a A ae AE
s s S U017F U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_belowdot dead_abovedot
k k K kra ampersand
l l L lstroke Lstroke
semicolon odiaeresis Odiaeresis doubleacute doubleacute
apostrophe adiaeresis Adiaeresis asciicircum asciicircum
grave_accent asciicircum degree notsign notsign
backslash numbersign apostrophe rightsinglequotemark grave
z y Y guillemotright U203A
x x X guillemotleft U2039
c c C cent copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu masculine
comma comma semicolon periodcentered multiply
dot period colon U2026 division
slash minus underscore endash emdash
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Separator
less less greater bar dead_belowmacron
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "fr": """\
1 ampersand 1 onesuperior exclamdown
2 eacute 2 asciitilde oneeighth
3 quotedbl 3 numbersign sterling
4 apostrophe 4 braceleft dollar
5 parenleft 5 bracketleft threeeighths
6 minus 6 bar fiveeighths
7 egrave 7 grave seveneighths
8 underscore 8 backslash trademark
9 ccedilla 9 asciicircum plusminus
0 agrave 0 at degree
minus parenright degree bracketright questiondown
equal equal plus braceright dead_ogonek
q a A ae AE
w z Z guillemotleft less
e e E EuroSign cent
r r R paragraph registered
t t T tslash Tslash
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left dead_circumflex dead_diaeresis dead_diaeresis dead_abovering
bracket_right dollar sterling currency dead_macron
a q Q at Greek_OMEGA
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon m M mu masculine
apostrophe ugrave percent dead_circumflex dead_caron
grave_accent twosuperior asciitilde notsign notsign
backslash asterisk mu dead_grave dead_breve
z w W lstroke Lstroke
x x X guillemotright greater
c c C cent copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m comma question dead_acute dead_doubleacute
comma semicolon period U2022 multiply
dot colon slash periodcentered division
slash exclam section dead_belowdot dead_abovedot
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "es": """\
1 1 exclam bar exclamdown
2 2 quotedbl at oneeighth
3 3 periodcentered numbersign sterling
4 4 dollar asciitilde dollar
5 5 percent onehalf threeeighths
6 6 ampersand notsign fiveeighths
7 7 slash braceleft seveneighths
8 8 parenleft bracketleft trademark
9 9 parenright bracketright plusminus
0 0 equal braceright degree
minus apostrophe question backslash questiondown
equal exclamdown questiondown dead_cedilla dead_ogonek
q q Q at Greek_OMEGA
w w W U017F section
e e E EuroSign cent
r r R paragraph registered
t t T tslash Tslash
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left dead_grave dead_circumflex bracketleft dead_abovering
bracket_right plus asterisk bracketright dead_macron
a a A ae AE
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon ntilde Ntilde dead_tilde dead_doubleacute
apostrophe dead_acute dead_diaeresis braceleft dead_caron
grave_accent masculine ordfeminine backslash backslash
backslash ccedilla Ccedilla braceright dead_breve
z z Z guillemotleft less
x x X guillemotright greater
c c C cent copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu masculine
comma comma semicolon U2022 multiply
dot period colon periodcentered division
slash minus underscore dead_belowdot dead_abovedot
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "it": """\
1 1 exclam onesuperior exclamdown
2 2 quotedbl twosuperior dead_doubleacute
3 3 sterling threesuperior dead_tilde
4 4 dollar onequarter oneeighth
5 5 percent onehalf threeeighths
6 6 ampersand notsign fiveeighths
7 7 slash braceleft seveneighths
8 8 parenleft bracketleft trademark
9 9 parenright bracketright plusminus
0 0 equal braceright dead_ogonek
minus apostrophe question grave questiondown
equal igrave asciicircum asciitilde dead_circumflex
q q Q at Greek_OMEGA
w w W U017F section
e e E EuroSign cent
r r R paragraph registered
t t T tslash Tslash
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left egrave eacute bracketleft braceleft
bracket_right plus asterisk bracketright braceright
a a A ae AE
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon ograve ccedilla at dead_cedilla
apostrophe agrave degree numbersign dead_abovering
grave_accent backslash bar notsign brokenbar
backslash ugrave section dead_grave dead_breve
z z Z guillemotleft less
x x X guillemotright greater
c c C cent copyright
v v V leftdoublequotemark leftsinglequotemark
b b B rightdoublequotemark rightsinglequotemark
n n N ntilde Ntilde
m m M mu masculine
comma comma semicolon dead_acute multiply
dot period colon periodcentered dead_diaeresis
slash minus underscore dead_macron division
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater guillemotleft guillemotright
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "sv": """\
1 1 exclam exclamdown onesuperior
2 2 quotedbl at twosuperior
3 3 numbersign sterling threesuperior
4 4 currency dollar onequarter
5 5 percent EuroSign cent
6 6 ampersand yen fiveeighths
7 7 slash braceleft division
8 8 parenleft bracketleft guillemotleft
9 9 parenright bracketright guillemotright
0 0 equal braceright degree
minus plus question backslash questiondown
equal dead_acute dead_grave plusminus notsign
q q Q at Greek_OMEGA
w w W U017F section
e e E EuroSign cent
r r R registered registered
t t T thorn THORN
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oe OE
p p P thorn THORN
bracket_left aring Aring dead_diaeresis dead_abovering
bracket_right dead_diaeresis dead_circumflex dead_tilde dead_caron
a a A ordfeminine masculine
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon odiaeresis Odiaeresis oslash Oslash
apostrophe adiaeresis Adiaeresis ae AE
grave_accent section onehalf paragraph threequarters
backslash apostrophe asterisk acute multiply
z z Z guillemotleft less
x x X guillemotright greater
c c C copyright copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu masculine
comma comma semicolon dead_cedilla dead_ogonek
dot period colon periodcentered dead_abovedot
slash minus underscore dead_belowdot dead_abovedot
spc space space space nobreakspace
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Separator
less less greater bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "pt-br": """\
1 1 exclam onesuperior exclamdown
2 2 at twosuperior onehalf
3 3 numbersign threesuperior threequarters
4 4 dollar sterling onequarter
5 5 percent cent threeeighths
6 6 dead_diaeresis notsign diaeresis
7 7 ampersand braceleft seveneighths
8 8 asterisk bracketleft trademark
9 9 parenleft bracketright plusminus
0 0 parenright braceright degree
minus minus underscore backslash questiondown
equal equal plus section dead_ogonek
q q Q slash slash
w w W question question
e e E degree degree
r r R registered registered
t t T tslash Tslash
y y Y leftarrow yen
u u U downarrow uparrow
i i I rightarrow idotless
o o O oslash Oslash
p p P thorn THORN
bracket_left dead_acute dead_grave acute grave
bracket_right bracketleft braceleft ordfeminine dead_macron
a a A ae AE
s s S ssharp U1E9E
d d D eth ETH
f f F dstroke ordfeminine
g g G eng ENG
h h H hstroke Hstroke
j j J dead_hook dead_horn
k k K kra ampersand
l l L lstroke Lstroke
semicolon ccedilla Ccedilla dead_acute dead_doubleacute
apostrophe dead_tilde dead_circumflex asciitilde asciicircum
grave_accent apostrophe quotedbl notsign notsign
backslash bracketright braceright masculine masculine
z z Z guillemotleft less
x x X guillemotright greater
c c C copyright copyright
v v V doublelowquotemark singlelowquotemark
b b B leftdoublequotemark leftsinglequotemark
n n N rightdoublequotemark rightsinglequotemark
m m M mu mu
comma comma less U2022 multiply
dot period greater periodcentered division
slash semicolon colon dead_belowdot dead_abovedot
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Separator
less backslash bar dead_caron dead_breve
ro slash question degree questiondown
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r ISO_Level3_Shift
""",
    "ko": """\
1 1 exclam
2 2 at
3 3 numbersign
4 4 dollar
5 5 percent
6 6 asciicircum
7 7 ampersand
8 8 asterisk
9 9 parenleft
0 0 parenright
minus minus underscore
equal equal plus
q q Q
w w W
e e E
r r R
t t T
y y Y
u u U
i i I
o o O
p p P
bracket_left bracketleft braceleft
bracket_right bracketright braceright
a a A
s s S
d d D
f f F
g g G
h h H
j j J
k k K
l l L
semicolon semicolon colon
apostrophe apostrophe quotedbl
grave_accent grave asciitilde
backslash backslash bar
z z Z
x x X
c c C
v v V
b b B
n n N
m m M
comma comma less
dot period greater
slash slash question
spc space
caps_lock Caps_Lock
kp_decimal KP_Delete - - - KP_Decimal
less less greater bar brokenbar
katakanahiragana Hiragana_Katakana
print Print - - - Sys_Req
alt_r Alt_R Meta_R
""",
}

# The keysyms above: name, number, character (numbers in hex); several to a line.
KEYSYMS = """\
space 20 20  exclam 21 21  quotedbl 22 22  numbersign 23 23  dollar 24 24  percent 25 25  ampersand 26 26
apostrophe 27 27  parenleft 28 28  parenright 29 29  asterisk 2a 2a  plus 2b 2b  comma 2c 2c  minus 2d 2d
period 2e 2e  slash 2f 2f  0 30 30  1 31 31  2 32 32  3 33 33  4 34 34  5 35 35  6 36 36  7 37 37  8 38 38
9 39 39  colon 3a 3a  semicolon 3b 3b  less 3c 3c  equal 3d 3d  greater 3e 3e  question 3f 3f  at 40 40
A 41 41  B 42 42  C 43 43  D 44 44  E 45 45  F 46 46  G 47 47  H 48 48  I 49 49  J 4a 4a  K 4b 4b  L 4c 4c
M 4d 4d  N 4e 4e  O 4f 4f  P 50 50  Q 51 51  R 52 52  S 53 53  T 54 54  U 55 55  V 56 56  W 57 57  X 58 58
Y 59 59  Z 5a 5a  bracketleft 5b 5b  backslash 5c 5c  bracketright 5d 5d  asciicircum 5e 5e
underscore 5f 5f  grave 60 60  a 61 61  b 62 62  c 63 63  d 64 64  e 65 65  f 66 66  g 67 67  h 68 68
i 69 69  j 6a 6a  k 6b 6b  l 6c 6c  m 6d 6d  n 6e 6e  o 6f 6f  p 70 70  q 71 71  r 72 72  s 73 73  t 74 74
u 75 75  v 76 76  w 77 77  x 78 78  y 79 79  z 7a 7a  braceleft 7b 7b  bar 7c 7c  braceright 7d 7d
asciitilde 7e 7e  nobreakspace a0 a0  exclamdown a1 a1  cent a2 a2  sterling a3 a3  currency a4 a4
yen a5 a5  brokenbar a6 a6  section a7 a7  diaeresis a8 a8  copyright a9 a9  ordfeminine aa aa
guillemotleft ab ab  notsign ac ac  registered ae ae  macron af af  degree b0 b0  plusminus b1 b1
twosuperior b2 b2  threesuperior b3 b3  acute b4 b4  mu b5 b5  paragraph b6 b6  periodcentered b7 b7
cedilla b8 b8  onesuperior b9 b9  masculine ba ba  guillemotright bb bb  onequarter bc bc  onehalf bd bd
threequarters be be  questiondown bf bf  Adiaeresis c4 c4  Aring c5 c5  AE c6 c6  Ccedilla c7 c7  ETH d0 d0
Ntilde d1 d1  Odiaeresis d6 d6  multiply d7 d7  Oslash d8 d8  Udiaeresis dc dc  THORN de de  ssharp df df
agrave e0 e0  adiaeresis e4 e4  aring e5 e5  ae e6 e6  ccedilla e7 e7  egrave e8 e8  eacute e9 e9
igrave ec ec  eth f0 f0  ntilde f1 f1  ograve f2 f2  odiaeresis f6 f6  division f7 f7  oslash f8 f8
ugrave f9 f9  udiaeresis fc fc  thorn fe fe  Lstroke 1a3 141  lstroke 1b3 142  doubleacute 1bd 2dd
dstroke 1f0 111  Hstroke 2a1 126  hstroke 2b1 127  idotless 2b9 131  kra 3a2 138  Tslash 3ac 166
tslash 3bc 167  ENG 3bd 14a  eng 3bf 14b  Greek_OMEGA 7d9 3a9  leftarrow 8fb 2190  uparrow 8fc 2191
rightarrow 8fd 2192  downarrow 8fe 2193  emdash aa9 2014  endash aaa 2013  oneeighth ac3 215b
threeeighths ac4 215c  fiveeighths ac5 215d  seveneighths ac6 215e  trademark ac9 2122
leftsinglequotemark ad0 2018  rightsinglequotemark ad1 2019  leftdoublequotemark ad2 201c
rightdoublequotemark ad3 201d  singlelowquotemark afd 201a  doublelowquotemark afe 201e  OE 13bc 152
oe 13bd 153  EuroSign 20ac 20ac  ISO_Level3_Shift fe03 -  ISO_Left_Tab fe20 -  dead_grave fe50 -
dead_acute fe51 -  dead_circumflex fe52 -  dead_tilde fe53 -  dead_macron fe54 -  dead_breve fe55 -
dead_abovedot fe56 -  dead_diaeresis fe57 -  dead_abovering fe58 -  dead_doubleacute fe59 -
dead_caron fe5a -  dead_cedilla fe5b -  dead_ogonek fe5c -  dead_belowdot fe60 -  dead_hook fe61 -
dead_horn fe62 -  dead_belowmacron fe68 -  BackSpace ff08 -  Tab ff09 -  Linefeed ff0a -  Return ff0d -
Pause ff13 -  Scroll_Lock ff14 -  Sys_Req ff15 -  Escape ff1b -  Kanji ff21 -  Muhenkan ff22 -
Henkan_Mode ff23 -  Romaji ff24 -  Hiragana ff25 -  Katakana ff26 -  Hiragana_Katakana ff27 -
Zenkaku_Hankaku ff2a -  Eisu_toggle ff30 -  Hangul ff31 -  Hangul_Hanja ff34 -  Home ff50 -  Left ff51 -
Up ff52 -  Right ff53 -  Down ff54 -  Prior ff55 -  Next ff56 -  End ff57 -  Print ff61 -  Execute ff62 -
Insert ff63 -  Undo ff65 -  Redo ff66 -  Menu ff67 -  Find ff68 -  Cancel ff69 -  Help ff6a -  Break ff6b -
Num_Lock ff7f -  KP_Enter ff8d -  KP_Home ff95 -  KP_Left ff96 -  KP_Up ff97 -  KP_Right ff98 -
KP_Down ff99 -  KP_Prior ff9a -  KP_Next ff9b -  KP_End ff9c -  KP_Begin ff9d -  KP_Insert ff9e -
KP_Delete ff9f -  KP_Multiply ffaa 2a  KP_Add ffab 2b  KP_Separator ffac 2c  KP_Subtract ffad 2d
KP_Decimal ffae 2e  KP_Divide ffaf 2f  KP_0 ffb0 30  KP_1 ffb1 31  KP_2 ffb2 32  KP_3 ffb3 33  KP_4 ffb4 34
KP_5 ffb5 35  KP_6 ffb6 36  KP_7 ffb7 37  KP_8 ffb8 38  KP_9 ffb9 39  KP_Equal ffbd 3d  F1 ffbe -
F2 ffbf -  F3 ffc0 -  F4 ffc1 -  F5 ffc2 -  F6 ffc3 -  F7 ffc4 -  F8 ffc5 -  F9 ffc6 -  F10 ffc7 -
F11 ffc8 -  F12 ffc9 -  Shift_L ffe1 -  Shift_R ffe2 -  Control_L ffe3 -  Control_R ffe4 -
Caps_Lock ffe5 -  Meta_L ffe7 -  Meta_R ffe8 -  Alt_L ffe9 -  Alt_R ffea -  Super_L ffeb -  Super_R ffec -
Delete ffff -  U017F 100017f 17f  U1E9E 1001e9e 1e9e  U2022 1002022 2022  U2026 1002026 2026
U2032 1002032 2032  U2033 1002033 2033  U2039 1002039 2039  U203A 100203a 203a  SunProps 1005ff70 -
SunFront 1005ff71 -  XF86AudioLowerVolume 1008ff11 -  XF86AudioMute 1008ff12 -
XF86AudioRaiseVolume 1008ff13 -  XF86AudioPlay 1008ff14 -  XF86AudioStop 1008ff15 -
XF86AudioPrev 1008ff16 -  XF86AudioNext 1008ff17 -  XF86HomePage 1008ff18 -  XF86Mail 1008ff19 -
XF86Calculator 1008ff1d -  XF86Back 1008ff26 -  XF86Forward 1008ff27 -  XF86PowerOff 1008ff2a -
XF86WakeUp 1008ff2b -  XF86Eject 1008ff2c -  XF86Sleep 1008ff2f -  XF86Favorites 1008ff30 -
XF86AudioPause 1008ff31 -  XF86AudioMedia 1008ff32 -  XF86MyComputer 1008ff33 -  XF86Copy 1008ff57 -
XF86Cut 1008ff58 -  XF86MenuKB 1008ff65 -  XF86Open 1008ff6b -  XF86Paste 1008ff6d -  XF86Reload 1008ff73 -
"""
