import pytest

from flax_transformer.interop.yaml_text import MAX_BYTES, read_yaml


def test_values_stay_text_and_keys_keep_their_spelling():
    text = b'a: 1\n"yes": [no, ~, 1.5]\n? "\\u00e9"\n: {b: \'it\'\'s\'}\n"no": ""\n'
    assert read_yaml(text, "x") == {"a": "1", "yes": ["no", "~", "1.5"], "é": {"b": "it's"}, "no": ""}
    assert read_yaml(b"", "x") == ""


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"a: &x [1, 2]\nb: [*x, *x]\n", "has an anchor, an alias or a tag"),
        (b'a: !!python/object/apply:os.system ["true"]\n', "has an anchor, an alias or a tag"),
        (b"a: !custom 1\n", "has an anchor, an alias or a tag"),
        (b"[" * 12 + b"]" * 12, "more than 8 levels deep"),
        (b"[" * 50_000, "no YAML|levels deep"),
        (b"a: 1\na: 2\n", "has the key 'a' twice"),
        (b"? [a]\n: 1\n", r"has the key \['a'\]"),
        (b"a: 1\n---\nb: 1\n", "has several YAML documents"),
        (b"a: [1\n", "is no YAML"),
        (b"a: \x00", "is no YAML"),
        (b"#" * (MAX_BYTES + 1), "of YAML, at most"),
    ],
)
def test_what_could_grow_or_run_code_is_refused_in_one_line(text, match):
    with pytest.raises(ValueError, match=match) as raised:
        read_yaml(text, "the file")
    assert "\n" not in str(raised.value) and str(raised.value).startswith("the file")
