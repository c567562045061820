"""The small text encoder and its tokenizer: real words, padding, saving, learning."""

import json
import sys
from pathlib import Path

import pytest
import torch

from genssm.models import CaptionTokenizer, TextEncoder

pytest.importorskip("tokenizers")
CAPTIONS = [f"{size} {colour} {shape}" for size in ("small", "large") for colour in ("red", "blue", "green")
            for shape in ("circle", "square")]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.learn(CAPTIONS, vocab_size=400, max_length=8)


def make_encoder(tokenizer: CaptionTokenizer, **changes: object) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(len(tokenizer), **{"hidden_size": 32, "num_layers": 2, "max_length": 8, **changes}).eval()


def test_words_of_the_captions_are_tokens(tokenizer: CaptionTokenizer) -> None:
    ids, mask = tokenizer(["small red circle", "Large  BLUE square"])
    assert ids.shape == mask.shape == (2, 8)
    assert mask.sum(dim=1).tolist() == [4, 4]  # the start token and three words
    assert tokenizer.decode(ids[0]) == "small red circle"
    assert (ids[~mask] == 0).all() and (ids[mask] != 0).all()


def test_any_text_has_tokens_and_comes_back(tokenizer: CaptionTokenizer) -> None:
    wide = CaptionTokenizer(tokenizer.backend, 64)
    for text in ("zürich ☃ 7", "<pad> <start>", "tab-less red_circle"):
        ids, mask = wide([text])
        assert wide.decode(ids[0][mask[0]]) == text
        assert (ids[0][mask[0]] == 0).sum() == 0
    ids, mask = wide(["", "   "])
    assert mask.sum(dim=1).tolist() == [1, 1]  # the start token alone
    assert torch.equal(ids[0], ids[1])


def test_long_texts_are_cut(tokenizer: CaptionTokenizer) -> None:
    ids, mask = tokenizer(["red " * 50])
    assert mask.all() and tokenizer.decode(ids[0]) == " ".join(["red"] * 7)


def test_same_captions_same_tokens(tokenizer: CaptionTokenizer) -> None:
    again = CaptionTokenizer.learn(CAPTIONS, vocab_size=400, max_length=8)
    assert json.loads(again.backend.to_str()) == json.loads(tokenizer.backend.to_str())


def test_save_load(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    encoder = make_encoder(tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder")
    loaded = CaptionTokenizer.from_pretrained(tmp_path / "tokenizer")
    twin = TextEncoder.from_pretrained(tmp_path / "text_encoder")
    texts = ["small red circle", "unheard of"]
    assert all(torch.equal(a, b) for a, b in zip(loaded(texts), tokenizer(texts)))
    with torch.no_grad():
        for a, b in zip(twin(*loaded(texts), return_dict=False), encoder(*tokenizer(texts), return_dict=False)):
            assert torch.equal(a, b)


def test_padding_changes_nothing(tokenizer: CaptionTokenizer) -> None:
    encoder = make_encoder(tokenizer)
    ids, mask = tokenizer(["small red circle"])
    full = encoder(ids, mask)
    short = encoder(ids[:, :4])
    torch.testing.assert_close(full.last_hidden_state[:, :4], short.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full.pooler_output, short.pooler_output, rtol=1e-5, atol=1e-5)
    other = torch.where(mask, ids, 5)
    torch.testing.assert_close(encoder(other, mask).pooler_output, full.pooler_output, rtol=1e-5, atol=1e-5)


def test_order_of_words_counts(tokenizer: CaptionTokenizer) -> None:
    encoder = make_encoder(tokenizer)
    a, b = encoder(*tokenizer(["red circle blue square", "blue circle red square"])).pooler_output
    assert not torch.allclose(a, b, atol=1e-4)


def test_every_parameter_learns(tokenizer: CaptionTokenizer) -> None:
    encoder = make_encoder(tokenizer).train()
    ids, mask = tokenizer(CAPTIONS)
    output = encoder(ids, mask)
    target = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(1))
    ((output.pooler_output - target).square().mean() + output.last_hidden_state.square().mean()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_compiles_to_one_graph(tokenizer: CaptionTokenizer) -> None:
    encoder = make_encoder(tokenizer)
    expected = encoder(*tokenizer(CAPTIONS)).pooler_output
    torch._dynamo.reset()
    encoder.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found = encoder(*tokenizer(CAPTIONS)).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: TextEncoder(300, hidden_size=30, num_heads=4), "num_heads=4 must divide"),
        (lambda t: make_encoder(t)(torch.ones(1, 9, dtype=torch.int64)), "reads up to 8"),
        (lambda t: make_encoder(t)(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 3)), r"expected \(1, 4\)"),
        (lambda t: CaptionTokenizer.learn(CAPTIONS, vocab_size=100), "at least 258"),
        (lambda t: CaptionTokenizer(t.backend, 0), "model_max_length is 0"),
    ],
)
def test_errors(tokenizer: CaptionTokenizer, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json and tokenizer_config\.json missing"):
        CaptionTokenizer.from_pretrained(tmp_path)


def test_tokenizer_of_another_library_is_refused(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    with pytest.raises(ValueError, match="holds a CLIPTokenizer; expected a CaptionTokenizer"):
        CaptionTokenizer.from_pretrained(tmp_path)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install genssm\[text\]"):
        CaptionTokenizer.learn(CAPTIONS)


@pytest.mark.gpu
def test_accelerator_equals_cpu(tokenizer: CaptionTokenizer) -> None:
    encoder = make_encoder(tokenizer)
    ids, mask = tokenizer(CAPTIONS)
    expected = encoder(ids, mask).pooler_output
    torch.testing.assert_close(
        encoder.cuda()(ids.cuda(), mask.cuda()).pooler_output.cpu(), expected, rtol=1e-3, atol=1e-3
    )
