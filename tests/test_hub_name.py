"""Names on the Hub, with and without a revision."""

import pytest

from efx_jax.hub_name import HubName, hub_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", HubName("meta-llama/Llama-3.2-1B")),
        ("gpt2", HubName("gpt2")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", HubName("owner/name", "refs/pr/3")),
    ],
)
def test_a_name_is_read_and_written_alike(text: str, expected: HubName) -> None:
    found = hub_name(text)
    assert found == expected and str(found) == text
    assert found.has_owner == ("/" in text)


@pytest.mark.parametrize(
    "text", ["", "./owner/name", "/owner/name", "~/name", "a/b/c", "owner/", "owner/name@", "owner/name@/x", "a b/c"]
)
def test_a_path_is_none(text: str) -> None:
    assert hub_name(text) is None
