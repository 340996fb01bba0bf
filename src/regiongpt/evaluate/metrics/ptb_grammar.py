r"""What is one word: the rules of the Penn Treebank tokenizer in CoreNLP 3.4.1, restated.

Its oddities are kept, for published figures rest on them: ``A.b`` is one word, ``ft.`` is two, and only some months'
names may end in a full stop. In patterns ``\l`` is a letter, ``\u`` one in upper case, ``\d`` a digit, ``\w`` whatever
else may stand inside a word besides, ``\a`` anything; a range such as ``,-_`` means what it says.
"""

import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Final

from regiongpt.evaluate.metrics.lexing import Lexer, Ranges, Rule, complement, united

PATTERNS: Final[Mapping[str, str]] = {
    # Blanks
    "BLANK": "[ \t\u00a0\u2000-\u200a\u3000]",
    "BREAK": "\r|\r?\n|[\u2028\u2029\u000b\u000c\u0085]",
    "GAP": "({BLANK}|{BREAK})",
    # Markup and entities
    "NAME": "[A-Za-z][A-Za-z0-9_:.-]*",
    "ATTRIBUTE": "{NAME}|{NAME} *= *('[^']*'|\"[^\"]*\")",
    "MARKUP": "<([!?][A-Za-z-][^>\r\n]*|{NAME}( +({ATTRIBUTE}))* */?|/{NAME}) *>",
    "ACCENTED": "&[aeiouAEIOU](acute|grave|uml);",
    "ENTITY": "&(HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);",
    "DASH": "&(MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]",
    # Quotes
    "APOSTROPHE": "(['\u0092\u2019]|&apos;)",
    "INNER": "({APOSTROPHE}|[`\u0091\u2018\u201b])",
    "DOUBLE": '("|&quot;)',
    "QUOTES": "({APOSTROPHE}|''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2})",
    # Words
    "LETTER": r"(\w|{ACCENTED})",
    "PART": r"{LETTER}({LETTER}|\d)*",
    "WORD": "{PART}([.!?]{PART})*",
    "VERB": "[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*",
    "NOT": "n{INNER}t",
    "ENDING": "{APOSTROPHE}([msdMSD]|re|ve|ll)",
    "WITH_APOSTROPHE": (
        r"{APOSTROPHE}n{APOSTROPHE}?|[lLdDjJ]{APOSTROPHE}|(Dunkin|somethin|ol){APOSTROPHE}|{APOSTROPHE}em"
        r"|[A-HJ-XZn]{INNER}\l\l+|{APOSTROPHE}[2-9]0s|{APOSTROPHE}till?|\l+[aeiouyAEIOUY]{INNER}[aeiouA-Z]\l*"
        r"|{APOSTROPHE}cause|cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|O{INNER}o"
    ),
    "HYPHENS": "[-_\u058a\u2010\u2011]",
    "ELIDED": r"([dDoOlL]{INNER}[\l\d])?[\l\d]+",
    "THING": "{ELIDED}({HYPHENS}{ELIDED})*",
    "HYPHENATED": "[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(-([A-Za-z0-9\u00ad]+|{INITIALS}\\.))+",
    "FIRM": "[A-Z]+(([+&]|&amp;)[A-Z]+)+",
    "SIDE": "[A-Za-z0-9]+(-[A-Za-z]+){0,2}",
    "SLASHED": r"{SIDE}(\\?/{SIDE}){1,2}",
    "SPECIAL": (
        "-(RRB|LRB|RCB|LCB|RSB|LSB)-|C\\.D\\.s|pro-|anti-|S(&|&amp;)P-500|S(&|&amp;)Ls"
        "|Cap{APOSTROPHE}n|c{APOSTROPHE}est"
    ),
    # Numbers
    "NUMBER": "[-+]?(\\d+|\\d*([.:,\u00ad\u066b\u066c]\\d+)+)",
    "DATE": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
    "RAISED": "[\u207a\u207b\u208a\u208b]?([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)",
    "FRACTION": "(\\d{1,4}[- \u00a0])?\\d{1,4}(\\\\?/|\u2044)\\d{1,4}",
    "PHONE": (
        "(\\([0-9]{2,3}\\)[ \u00a0]?|(\\+\\+?)?([0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])[0-9]{3,4}[- \u00a0]?"
        "[0-9]{3,5}|((\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}"
    ),
    "CURRENCY": "[\u00a2-\u00a5\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]",
    # Addresses and files
    "URL": 'https?://[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},-]',
    "SITE": (
        '(www\\.([^ \t\n\f\r"<>|.!?(){},]+\\.)+[a-zA-Z]{2,4}|([^ \t\n\f\r"`\'<>|.!?(){},-_$]+\\.)+(com|net|org|edu))'
        '(/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-])?'
    ),
    "MAIL": (
        '(&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\u00a0]*@([^ \t\n\f\r"<>|(){}.\u00a0]+\\.)*'
        '[^ \t\n\f\r"<>|(){}.\u00a0]+(&gt;|>)?'
    ),
    "HANDLE": "@[a-zA-Z_][a-zA-Z_0-9]*|#{LETTER}+",
    "FILE": (
        r"({LETTER}|\d)+(\.({LETTER}|\d)+)*\.(bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov"
        r"|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)"
    ),
    # Abbreviations. Those that mostly end a clause or stand before lower case: a capital behind begins a sentence.
    "MONTHS": "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec",
    "DAYS": "Mon|Tues?|Wed|Thu|Thurs|Fri",
    "STATES": (
        "Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md|Mich|Minn|[M]iss"
        "|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|Vt|[W]ash|Wisc?|Wyo"
    ),
    "FIRMS": "Inc|Cos?|Corp|Pp?t[ey]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys",
    "CLOSING": (
        r"({MONTHS}|{DAYS}|{STATES}|{FIRMS}|tel|est|ext|sq|Jr|Sr|Bros|(Ed|Ph)\.D|Blvd|Rd|Esq|etc|al|seq|Bldg)\."
    ),
    # Those that stand before a capital without an end of a sentence.
    "INITIALS": r"([A-Za-z](\.[A-Za-z])+|(Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(U\.K|U\.S\.S\.R))",
    "ACRONYM": "([A-Za-z]|{INITIALS})",
    "TITLES": (
        "Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Mt|Capt|Ste?"
        "|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc"
    ),
    "OPENING": r"({TITLES}|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|{ACRONYM}|Invt|Elec|Natl|M[ft]g|Dept)",
    "COUNTING": r"(ca|figs?|prop|nos?|art|bldg|pp|op)\.",
    "STARTERS": (
        r"[A]bout|[A]ccording|[A]dditionally|[A]fter|[A]n|[A]|[A]s|[A]t|[B]ut|[E]arlier|[H]e|[H]er|[H]ere|[H]owever"
        r"|[I]f|[I]n|[I]t|[L]ast|[M]any|[M]ore|[M]r\.|[M]s\.|[N]ow|[O]nce|[O]ne|[O]ther|[O]ur|[S]he|[S]ince|[S]o"
        r"|[S]ome|[S]uch|[T]hat|[T]he|[T]heir|[T]hen|[T]here|[T]hese|[T]hey|[T]his|[W]e|[W]hen|[W]hile|[W]hat"
        r"|[Y]et|[Y]ou"
    ),
    # Signs
    "DOTS": "\\.{3,5}|(\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]",
    "PAUSE": "[,;:\u3001]",
    "SMILEY": r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]",
    "FACE": (
        r"[\^x=~<>]\.\[\^x=[^<]*<>\]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)"
        r"|\([\^x=~<>']-[\^x=~<>'`]\)"
    ),
    "SYMBOL": (
        "[+%&~\\^|\\\\\u00a6-\u00a9\u00ac\u00ae-\u00ba\u00d7\u00f7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
        "\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f"
        "\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e"
        "\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
    ),
}

RULES: Final = (
    Rule("plain", r"c\+\+|(c|f)#"),
    Rule("split 3", "cannot|'twas"),
    Rule("split 2", "'tis|gonna|gotta|lemme|gimme|wanna"),
    Rule("spaced", "{MARKUP}"),
    Rule("dash", "{DASH}"),
    Rule("ampersand", "&amp;"),
    Rule("plain", "{ENTITY}"),
    Rule("word", "{WORD}", "{ENDING}"),
    Rule("word", "{VERB}", "{NOT}"),
    Rule("word", "{WORD}"),
    Rule("plain", "{WITH_APOSTROPHE}"),
    Rule("plain", "y{APOSTROPHE}", r"\l"),
    Rule("plain", "{URL}|{SITE}|{MAIL}|{HANDLE}"),
    Rule("closing quote", "{ENDING}|{NOT}", "[^A-Za-z]"),
    Rule("plain", "{DATE}"),
    Rule("word", "{NUMBER}"),
    Rule("plain", "{RAISED}"),
    Rule("spaced", "{FRACTION}"),
    Rule("fraction", "[\u00bc-\u00be\u2153-\u215e]"),
    Rule("ampersand", "{SPECIAL}"),
    Rule("plain", "{SLASHED}"),
    Rule("plain", r"[A-Z]*\$|#"),
    Rule("currency", "{CURRENCY}"),
    Rule("acronym", r"{ACRONYM}\.", "{GAP}+({STARTERS}|{MARKUP}){GAP}"),
    Rule("trimmed", "{COUNTING}", r"{GAP}?\d"),
    Rule("plain", r"(pt[eyEY]|co)\.", "{BLANK}(ltd|lim)"),
    Rule("sentence", "{CLOSING}", r"{GAP}({GAP}|\u|{MARKUP})"),
    Rule("plain", "{CLOSING}", r"\a\a"),
    Rule("sentence", "{CLOSING}"),
    Rule("plain", r"{OPENING}\."),
    Rule("plain", "{OPENING}", "{BLANK}"),
    Rule("plain", "{ACRONYM}", "{GAP}"),
    Rule("plain", "{APOSTROPHE}[0-9][0-9]", "{GAP}"),
    Rule("plain", "{FILE}", "{GAP}|[.?!,]"),
    Rule("word", r"{WORD}\.", "{PAUSE}"),
    Rule("joined", "{PHONE}"),
    Rule("opening quote", "{DOUBLE}", "[A-Za-z0-9$]"),
    Rule("closing quote", "{DOUBLE}"),
    Rule("nothing", "\x7f"),
    Rule("less", "<|&lt;"),
    Rule("greater", ">|&gt;"),
    Rule("joined", "{SMILEY}", "[^A-Za-z0-9]"),
    Rule("joined", "{FACE}"),
    Rule("bracket", r"[\[\](){}]"),
    Rule("hyphens", "-+"),
    Rule("dots", "{DOTS}"),
    Rule("plain", r"@+|#+|_+|\*+|(\\\*){1,3}|{PAUSE}|[?!]+"),
    Rule("plain", "[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002=/]"),
    Rule("word", "{HYPHENATED}\\.", "{PAUSE}"),
    Rule("word", "{HYPHENATED}"),
    Rule("plain", r"{THING}\.", "{PAUSE}"),
    Rule("plain", "{THING}"),
    Rule("ampersand", r"{FIRM}\.", "{PAUSE}"),
    Rule("ampersand", "{FIRM}"),
    Rule("opening quote", "'", "[A-Za-z][^ \t\n\r\u00a0]"),
    Rule("closing quote", "{ENDING}|{NOT}|{QUOTES}"),
    Rule("plain", "<<|>>|{SYMBOL}"),
    Rule("nothing", "\0|{BLANK}+|{BREAK}|&nbsp;|[\u200b\u200e\u200f\ufeff]"),
    Rule("nothing", r"\a"),
)
"""In order of precedence; the last one drops what has no place in a text."""

# Letters that Unicode knows since its version 6.1, digits that came later, and marks that words may hold.
_YOUNG_LETTERS = """37F 528-52F 560 588 5EF 860-887 889-88E 8A1 8AD-8C9 978 980 9FC AF9 C34 C5A C5D C80 CDD D04 D54-D56
    D5F E86 E89 E8C E8E-E93 E98 EA0 EA8-EA9 EAC 13F5 13F8-13FD 16F1-16F8 170D 171F 1878 191D-191E 19B0-19C0 19C8-19C9
    1B4C 1C80-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF A698-A69D A78F A794-A79F A7AB-A7F7
    A8FD-A8FE A9E0-A9EF A9FA-A9FE AA7E-AA7F AB30-ABBF"""
_YOUNG_CAPITALS = "13A0-13F5"
_YOUNG_DIGITS = "DE6-DEF A9F0-A9F9"
_IN_WORDS = """AD 237-24F 2C2-2C5 2D2-2DF 2E5-37D 384-385 3CF 3F6 3FC-3FF 483-487 4CF 4F6-4FF 510-525 55A-55F 591-5BD
    5BF 5C1-5C2 5C4-5C5 5C7 615-61A 63B-63F 64B-65E 670 6D6-6EF 6FA-6FF 70F 711 730-74F 750-77F 7A6-7B1 7CA-7F5 7FA
    900-903 93C 93E-94E 951-955 962-963 981-983 9BC-9C4 9C7-9C8 9CB-9CD 9D7 9E2-9E3 A01-A03 A3C A3E-A4F A81-A83 ABC-ACF
    B82 BBE-BC2 BC6-BC8 BCA-BCD C01-C03 C3E-C56 D3E-D44 D46-D48 E30-E3A E47-E4E EB1-EBC EC8-ECD"""


@cache
def ptb_lexer() -> Lexer:
    """The lexer of :data:`RULES`, built once."""
    units = [chr(unit) for unit in range(0x10000)]
    letters = _without([c for c in units if unicodedata.category(c).startswith("L")], _YOUNG_LETTERS)
    letters = united([*letters, (0x1885, 0x1886)])
    capitals = _without([c for c in units if c.isupper()], f"{_YOUNG_LETTERS} {_YOUNG_CAPITALS}")
    digits = _without([c for c in units if unicodedata.category(c) == "Nd"], _YOUNG_DIGITS)
    classes = {"a": ((0, 0xFFFF),), "l": letters, "u": capitals, "d": digits}
    return Lexer(RULES, PATTERNS, {**classes, "w": united([*letters, *_spans(_IN_WORDS)])})


def _spans(text: str) -> list[tuple[int, int]]:
    ends = [part.split("-") for part in text.split()]
    return [(int(each[0], 16), int(each[-1], 16)) for each in ends]


def _without(characters: list[str], young: str) -> Ranges:
    found = united((ord(c), ord(c)) for c in characters)
    return complement(united([*complement(found), *_spans(young)]))
