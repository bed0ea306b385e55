"""The one normaliser: storing, look-up, import and matching all compare values through these functions.

Every function accepts any text and never raises. The functions named ``*_key`` are idempotent, so a stored
key may be normalised again without harm.
"""

import re
import unicodedata

import phonenumbers
from django.core.exceptions import ValidationError
from django.core.validators import validate_email

from customers.countries import ALPHA2, CODE_OF

EMAIL_MAX_LENGTH = 254
PHONE_KEY_MAX_LENGTH = 32

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# What str.strip() takes for blank, less the control characters among it: those are for boundaries to refuse.
_BLANKS = "".join(
    character for character in map(chr, range(0x3001)) if character.isspace() and not _CONTROL.match(character)
)

_FIRST_MARK = "\u0300"
# What validate_email takes at any rate, and quickly told. No part is longer than the whole.
_LABEL_LENGTH = 63
_USUAL_EMAIL = re.compile(
    r"[a-z0-9]+(?:[._+-][a-z0-9]+)*@(?:[a-z0-9]+(?:-[a-z0-9]+)*\.)+[a-z]{2,}", re.ASCII | re.IGNORECASE
)

_PHONE_PUNCTUATION = str.maketrans("", "", " -./()")
_PHONE_START = re.compile(r"[+\d]", re.ASCII)
_NOT_DIGITS = re.compile(r"\D+", re.ASCII)
_DOUBLE_ZERO = re.compile(r"\D*0\D*0", re.ASCII)
# Calling code and first digit that rule out a trunk prefix: phonenumbers would return these as they are.
_ALREADY_E164 = re.compile(
    r"\+(?:1[2-9]|7[1-79]"
    r"|(?:2[07]|3[0-469]|4[01356789]|5[12378]|6[02-6]|8[124]|9[0-58])[1-9]"
    r"|(?:44|55|61|86)[2-8])\d{5,11}",
    re.ASCII,
)


def clean_text(text: str) -> str:
    """The form in which text is stored: NFC without outer blanks; control characters stay where they are."""
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).strip(_BLANKS)


def has_control_characters(text: str) -> bool:
    """Whether a boundary must refuse the text: C0 other than tab and line ends, DEL, or a lone surrogate."""
    return _CONTROL.search(text) is not None


def email_key(text: str) -> str:
    """Addresses that differ only in case, composition or outer blanks share a key; "" for blank text."""
    text = text.strip()
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFD", text).casefold()
    return unicodedata.normalize("NFC", folded).strip()


def is_email(text: str) -> bool:
    """Whether the text, outer blanks aside, is one well-formed address of at most 254 characters."""
    text = text.strip()
    if len(text) <= _LABEL_LENGTH and _USUAL_EMAIL.fullmatch(text):
        return True
    if len(text) > EMAIL_MAX_LENGTH:
        return False
    try:
        validate_email(text)
    except ValidationError:
        return False
    return True


def phone_key(text: str, *, country: str = "") -> str:
    """E.164 if the number names its country (by + or 00) or `country` supplies it, else its digits alone.

    `country` is an alpha-2 code; an unknown one counts as none. A number need not exist in its country's
    plan. An extension is not part of an E.164 key. Text without digits has the key "".
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    compact = text.translate(_PHONE_PUNCTUATION)
    if _ALREADY_E164.fullmatch(compact):
        return compact
    digits = _NOT_DIGITS.sub("", text)
    start = _PHONE_START.search(text)
    if not digits or start is None:
        return ""
    key = ""
    if start.group() == "+":
        key = _e164(text[start.start() :]) or _e164("+" + digits)
    elif digits.startswith("00"):
        key = _e164("+" + _DOUBLE_ZERO.sub("", text, count=1)) or _e164("+" + digits[2:])
    if not key and country:
        key = _e164(text, country) or _e164(digits, country)
    # Digits that follow from a + may themselves begin with 00; they then name a country on the next reading.
    if not key and digits.startswith("00"):
        key = _e164("+" + digits[2:])
    return key or digits[:PHONE_KEY_MAX_LENGTH]


def _e164(text: str, country: str = "") -> str:
    """E.164 that reads back as itself, or "" if phonenumbers can make nothing of the text."""
    key = _parsed(text, country)
    # One reading drops one trunk prefix, and "+49 0 030 ..." has two; every further reading is shorter.
    while key and key != text and not _ALREADY_E164.fullmatch(key) and (again := _parsed(key)) != key:
        key = again
    return key


def _parsed(text: str, country: str = "") -> str:
    region = country.upper()
    try:
        number = phonenumbers.parse(text, region if region in ALPHA2 else None)
    except phonenumbers.NumberParseException:
        return ""
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


def name_key(text: str) -> str:
    """Names that differ only in case, accents, compatibility forms or blanks share a key.

    Letters that are no base letter plus mark stay as they are: "ø" and "ł" do not fold to "o" and "l".
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = unicodedata.normalize("NFKD", text.casefold())
        text = "".join([c for c in text if c < _FIRST_MARK or unicodedata.category(c) != "Mn"])
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def country_code(text: str) -> str:
    """The alpha-2 code of a country given by either ISO code or a usual name; "" if unknown."""
    if text in ALPHA2:
        return text
    spelling = name_key(text).replace(".", "").replace("\u2019", "'").replace("&", " and ")
    spelling = " ".join(spelling.split()).removeprefix("the ")
    return CODE_OF.get(spelling, "")


def split_name(name: str) -> tuple[str, str]:
    """First and last name, parted at the last blank; a name of one word is a first name."""
    first, *last = name.strip().rsplit(maxsplit=1) or [""]
    return first, "".join(last)


def join_name(first: str, last: str) -> str:
    """The full name; either part may be blank."""
    return " ".join(part for part in (first.strip(), last.strip()) if part)
