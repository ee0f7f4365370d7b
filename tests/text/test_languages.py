import pytest

from flax_transformer.text.languages import token_of


def test_a_language_is_named_by_the_token_that_a_model_has_for_it():
    tokens = (">>kan<<", ">>tel<<", ">>zho_Hans<<", ">>zho_Hant<<", ">>en<<")
    named = {code: token_of(code, tokens) for code in ("kn", "kan_Knda", "te", "zho_Hant", "en", "eng_Latn")}
    assert list(named.values()) == [">>kan<<", ">>kan<<", ">>tel<<", ">>zho_Hant<<", ">>en<<", ">>en<<"]
    regions = (">>pt<<", ">>pt-BR<<", ">>zh_tw<<")
    assert [token_of(code, regions) for code in ("pt", "pt-BR", "pt_br", ">>pt-BR<<", "zh-TW")] == [
        ">>pt<<", ">>pt-BR<<", ">>pt-BR<<", ">>pt-BR<<", ">>zh_tw<<"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="2 tokens name the language 'zh': write one of >>zho_Hans<<, >>zho_Hant<<"):
        token_of("zh", tokens)
    with pytest.raises(ValueError, match="no token names the language 'de': write one of >>kan<<, >>tel<<"):
        token_of("de", tokens)
