"""What makes two rows the same."""

from efx_jax.data.overlap import fingerprint, group_numbers, without_shared
from efx_jax.data.prompts import Example


def test_case_punctuation_and_blanks_make_no_difference() -> None:
    assert fingerprint("Is it, really?", "YES") == fingerprint("is it\nreally", "yes!")
    assert fingerprint("Straße 5") == fingerprint("STRASSE-5")
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint("b", "a")
    assert len({fingerprint(f"{dose} mg") for dose in ("5.1", "5.2", "51", "52")}) == 4
    assert fingerprint("x < 5") != fingerprint("x > 5")
    assert fingerprint("कि") != fingerprint("की")
    assert fingerprint("患者は回復した") != fingerprint("患者は回復しない")
    sums = ("5-3", "5*3", "5/3", "53", "5 % 3", "-53", "$53", "5+3", "C#", "C")
    assert len({fingerprint(text) for text in sums}) == len(sums)
    for one, other in (("5 - 3", "5-3"), ("1990-2000", "1990\u20132000"), ("X-ray", "x ray"), ("50 % of", "50% of")):
        assert fingerprint(one) == fingerprint(other)
    assert fingerprint("caf\u00e9") == fingerprint("cafe\u0301") and fingerprint("\uff15 mg") == fingerprint("5 mg")
    numbers = ("1 12 3", "11 2 3", "1, 123", "1123", "1.1 23")
    assert len({fingerprint(text) for text in numbers}) == len(numbers)
    assert fingerprint("1,000 of 2, 3") == fingerprint("1000 of 2 3") == fingerprint("1000 of 2;\n3")
    assert fingerprint("?") != fingerprint("!!") != fingerprint("")


def test_any_key_in_common_is_shared() -> None:
    def row(*keys: str) -> Example:
        return Example("p", "r", keys=keys)

    train = [row("text a", "summary a"), row("text b", "summary b"), row()]
    kept, shared = without_shared(train, [row("text c", "summary b"), row()])
    assert ([example.keys for example in kept], [example.keys for example in shared]) == (
        [("text a", "summary a"), ()],
        [("text b", "summary b")],
    )


def test_rows_that_share_a_key_or_a_third_row_are_one_group() -> None:
    keys = [("a",), ("b", "1"), (), ("a",), ("c", "1"), (), ("c",), ("d", "a")]
    assert group_numbers([Example("p", "r", keys=key) for key in keys]) == [0, 1, 2, 0, 1, 3, 1, 0]
