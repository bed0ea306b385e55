import unicodedata
from collections.abc import Callable

import phonenumbers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from customers.countries import ALPHA2, CODE_OF
from customers.normalize import (
    clean_text,
    country_code,
    email_key,
    has_control_characters,
    is_email,
    join_name,
    name_key,
    phone_key,
    split_name,
)

examples = settings(max_examples=200, deadline=None)

# Any text at all, lone surrogates included.
any_text = st.text(st.characters())
surrogates = st.text(st.characters(categories=["Cs"]), max_size=3)
anything = st.one_of(any_text, st.builds("".join, st.tuples(any_text, surrogates, any_text)))
phone_like = st.text("0123456789+ -./()~x#;,eEt\u0663\uff17\uff0b", max_size=45)
international = st.builds(
    "+{}{}{}".format,
    st.sampled_from(sorted(phonenumbers.COUNTRY_CODE_TO_REGION_CODE)),
    st.sampled_from(["", " ", " (0)", "0", "00", " 06", "8", "15", "90"]),
    st.text("0123456789", min_size=1, max_size=14),
)
phones = st.one_of(anything, phone_like, international)
countries = st.one_of(st.just(""), st.sampled_from(sorted(ALPHA2)), anything)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", ""),
        (" \t\n", ""),
        (" Ann@Example.COM ", "ann@example.com"),
        ("JO\u0308RG@example.com", "j\u00f6rg@example.com"),
        ("Straße@example.com", "strasse@example.com"),
        ("not an address", "not an address"),
    ],
)
def test_an_email_key_ignores_case_composition_and_outer_blanks(text: str, key: str) -> None:
    assert email_key(text) == key


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("ann@example.com", True),
        ("  ann@example.com\n", True),
        ("ann+tag@mail.example.co.uk", True),
        ("ann@müller.example", True),
        ("", False),
        ("ann", False),
        ("ann@", False),
        ("@example.com", False),
        ("ann@example", False),
        ("ann bell@example.com", False),
        ("a@example.com, b@example.com", False),
        ("ann@example.com\x00", False),
    ],
)
def test_an_email_is_one_well_formed_address(text: str, well_formed: bool) -> None:
    assert is_email(text) is well_formed


@pytest.mark.parametrize(("length", "well_formed"), [(254, True), (255, False)])
def test_an_email_has_at_most_254_characters(length: int, well_formed: bool) -> None:
    domain = "." + ".".join(["d" * 60] * 3) + ".example.com"
    address = "a@" + "d" * (length - 2 - len(domain)) + domain
    assert len(address) == length
    assert is_email(address) is well_formed


@pytest.mark.parametrize(
    ("text", "country", "key"),
    [
        ("", "", ""),
        ("none", "", ""),
        ("+", "DE", ""),
        ("+1234567890", "", "+1234567890"),
        ("+123456789", "", "+123456789"),
        ("1234567890", "", "1234567890"),
        ("+1 (212) 555-0123", "", "+12125550123"),
        ("+49 30 1234567", "", "+49301234567"),
        ("+49 (0)30 1234567", "", "+49301234567"),
        ("+49030/1234567", "", "+49301234567"),
        ("(+49) 30 1234567", "", "+49301234567"),
        ("Tel. +49 30 1234567", "", "+49301234567"),
        ("0049 30 1234567", "", "+49301234567"),
        ("00 49 (0)30 1234567", "", "+49301234567"),
        ("+39 06 1234567", "", "+39061234567"),
        ("+49 30 1234567", "US", "+49301234567"),
        ("030 1234567", "DE", "+49301234567"),
        ("030 1234567", "de", "+49301234567"),
        ("4930 1234567", "DE", "+49301234567"),
        ("(212) 555-0123", "US", "+12125550123"),
        ("1-212-555-0123", "US", "+12125550123"),
        ("030 1234567", "", "0301234567"),
        ("030 1234567", "XX", "0301234567"),
        ("030 1234567", "Germany", "0301234567"),
        ("+999 123456", "", "999123456"),
        ("٠٣٠ ١٢٣٤٥٦٧", "", "0301234567"),
        ("\uff0b\uff14\uff19 30 1234567", "", "+49301234567"),
        ("+49 30 1234567 ext. 5", "", "+49301234567"),
        ("1" * 50, "", "1" * 32),
        ("1" * 50, "DE", "1" * 32),
    ],
)
def test_a_phone_key_is_e164_where_the_country_is_known_and_digits_elsewhere(text: str, country: str, key: str) -> None:
    assert phone_key(text, country=country) == key


@examples
@given(phones, countries)
@example("+49 0 030 1234567", "")
@example("+00 49 30 1234567", "")
@example("0" * 40, "")
def test_a_phone_key_keeps_its_value_when_normalised_again(text: str, country: str) -> None:
    key = phone_key(text, country=country)
    assert phone_key(key, country=country) == key
    if key.startswith("+"):
        assert phone_key(key) == key


@examples
@given(phones, countries)
def test_a_phone_key_is_at_most_32_ascii_digits_behind_an_optional_plus(text: str, country: str) -> None:
    key = phone_key(text, country=country)
    assert len(key) <= 32
    assert key == "" or (key.removeprefix("+").isdigit() and key.isascii())


@settings(max_examples=1000, deadline=None)
@given(international)
def test_the_quick_path_for_phones_agrees_with_phonenumbers(text: str) -> None:
    key = phone_key(text)
    try:
        parsed = phonenumbers.parse(key)
    except phonenumbers.NumberParseException:
        assert not key.startswith("+")
        return
    assert phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164) == key


@examples
@given(international, st.sampled_from([" ", "-", ".", "/", "  "]))
def test_separators_inside_a_phone_do_not_change_its_key(text: str, separator: str) -> None:
    compact = text.replace(" ", "").replace("(0)", "0")
    assert phone_key(compact[:5] + separator + compact[5:]) == phone_key(compact)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", ""),
        ("  Ann\t Marie \n Bell ", "ann marie bell"),
        ("Dö", "do"),
        ("Do\u0308", "do"),
        ("Do", "do"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("Żółć", "zołc"),
        ("İpek", "ipek"),
        ("Søren", "søren"),
        ("\uff21\uff2e\uff2e", "ann"),
        ("Acme\u00a0Ltd", "acme ltd"),
        ("김철수", "김철수"),
    ],
)
def test_a_name_key_ignores_case_accents_and_blanks(text: str, key: str) -> None:
    assert name_key(text) == key


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", ""),
        ("DE", "DE"),
        (" de ", "DE"),
        ("DEU", "DE"),
        ("deutschland", "DE"),
        ("Germany", "DE"),
        ("USA", "US"),
        ("U.S.A.", "US"),
        ("United States", "US"),
        ("The United  States of America", "US"),
        ("UK", "GB"),
        ("Great Britain", "GB"),
        ("England", "GB"),
        ("Österreich", "AT"),
        ("Osterreich", "AT"),
        ("Côte d\u2019Ivoire", "CI"),
        ("Trinidad & Tobago", "TT"),
        ("St. Lucia", "LC"),
        ("South Korea", "KR"),
        ("Republic of Korea", "KR"),
        ("Россия", "RU"),
        ("中国", "CN"),
        ("The Netherlands", "NL"),
        ("the", ""),
        ("Atlantis", ""),
        ("XX", ""),
        ("ZZZ", ""),
    ],
)
def test_a_country_is_known_by_code_and_by_usual_names(text: str, code: str) -> None:
    assert country_code(text) == code


def test_every_listed_spelling_is_found_as_written_and_in_capitals() -> None:
    assert len(ALPHA2) == 249
    assert set(CODE_OF.values()) == ALPHA2
    for spelling, code in CODE_OF.items():
        assert country_code(spelling) == code, spelling
        assert country_code(spelling.upper()) == code, spelling


def test_no_spelling_in_the_table_stands_for_two_countries() -> None:
    from customers import countries

    spellings = [spelling for row in countries._ROWS for spelling in countries._spellings(row)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("  a  b\u00a0", "a  b"),
        ("\ta\r\n", "a"),
        ("e\u0301", "\u00e9"),
        ("a\x00", "a\x00"),
        ("\x1fa\x0b", "\x1fa\x0b"),
    ],
)
def test_cleaning_composes_and_strips_but_keeps_control_characters(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("", False),
        ("Ann\tBell\r\n", False),
        ("Zoë 日本 😀", False),
        ("a\x00b", True),
        ("\x1b[0m", True),
        ("\x0b", True),
        ("\x0c", True),
        ("\x7f", True),
        ("\ud800", True),
        ("a\udfff", True),
    ],
)
def test_control_characters_and_lone_surrogates_are_recognised(text: str, refused: bool) -> None:
    assert has_control_characters(text) is refused


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("", ("", "")),
        ("  ", ("", "")),
        ("Ann", ("Ann", "")),
        ("Ann Bell", ("Ann", "Bell")),
        (" Ann Marie  Bell ", ("Ann Marie", "Bell")),
    ],
)
def test_a_name_is_split_at_its_last_blank(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [
        ("Ann", "Bell", "Ann Bell"),
        ("Ann", "", "Ann"),
        ("", "Bell", "Bell"),
        (" ", " ", ""),
        (" A ", " B ", "A B"),
    ],
)
def test_a_name_is_joined_from_the_parts_there_are(first: str, last: str, name: str) -> None:
    assert join_name(first, last) == name


@examples
@given(anything)
def test_splitting_and_joining_a_name_loses_nothing_but_blanks(name: str) -> None:
    assert join_name(*split_name(name)).split() == name.split()


@pytest.mark.parametrize("normalise", [email_key, name_key, clean_text, country_code])
@examples
@given(text=anything)
@example(text="\u0345\u0399")
@example(text="\u00b4 ")
@example(text="㎒")
def test_normalising_twice_is_normalising_once(normalise: Callable[[str], str], text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@examples
@given(anything)
def test_composed_and_decomposed_text_share_their_keys(text: str) -> None:
    for normalise in (email_key, name_key, country_code, clean_text):
        assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)


@examples
@given(anything)
def test_no_text_makes_a_check_raise(text: str) -> None:
    assert is_email(text) in (True, False)
    assert is_email(f"a@{text}.example") in (True, False)
    assert has_control_characters(text) in (True, False)
    assert country_code(text) in ALPHA2 | {""}
