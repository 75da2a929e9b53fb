import pytest
import torch

from serve_app.engine.prompt_weights import parse_weights
from serve_app.engine.prompts import PromptEncoder, encode_prompt
from serve_app.models.components import BaseComponents
from support.tiny import Zoo, renamed, request, task


def encoded(base: BaseComponents, prompt: str, clip_skip: int | None) -> torch.Tensor:
    return encode_prompt(base, parse_weights(prompt), clip_skip).text


def test_a_long_prompt_is_its_pieces_in_a_row(zoo: Zoo) -> None:
    """One letter is one token: 80 letters are a piece of 75 and a piece of 5."""
    letters = " ".join("abcdefgh" * 10)
    whole = encoded(zoo.base, letters, None)
    first = encoded(zoo.base, " ".join(("abcdefgh" * 10)[:75]), None)
    second = encoded(zoo.base, " ".join(("abcdefgh" * 10)[75:]), None)
    assert whole.shape == (1, 154, 16)
    torch.testing.assert_close(whole, torch.cat([first, second], dim=1))


def test_the_shorter_prompt_is_filled_up_with_empty_pieces(zoo: Zoo) -> None:
    rows = PromptEncoder().rows(request(zoo, task(prompt="a b", negative_prompt="word " * 60))).text
    empty = encoded(zoo.base, "", None)
    assert rows.shape == (2, 77 * 4, 16)
    torch.testing.assert_close(rows[1:, 77:154], empty)
    torch.testing.assert_close(rows[1:, :77], encoded(zoo.base, "a b", None))


def test_without_guidance_there_is_one_row(zoo: Zoo) -> None:
    assert PromptEncoder().rows(request(zoo, task(guidance_scale=1.0))).text.shape == (1, 77, 16)


def test_embeddings_are_kept_by_model_prompt_and_clip_skip(zoo: Zoo) -> None:
    calls = []
    hook = zoo.base.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    prompts = PromptEncoder()
    asked = request(zoo, task(prompt="a cat", negative_prompt=""))
    for _ in range(3):
        prompts.rows(asked)
    kept = len(calls)
    prompts.rows(request(zoo, task(prompt="a cat", negative_prompt="", clip_skip=1)))
    skipped = len(calls)
    other = Zoo(renamed(zoo.base, "other"), zoo.inpaint, zoo.nets)
    prompts.rows(request(other, task(prompt="a cat", negative_prompt="")))
    hook.remove()
    assert (kept, skipped, len(calls)) == (2, 3, 5)


def test_the_cache_is_bounded_in_bytes(zoo: Zoo) -> None:
    """A hundred pieces are more than the room: such a prompt is encoded, and drives out no more than it has to."""
    piece_bytes = 77 * 16 * 4
    prompts = PromptEncoder(cache_bytes=10 * piece_bytes)
    calls = []
    hook = zoo.base.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))

    def forwards(prompt: str) -> int:
        before = len(calls)
        prompts.rows(request(zoo, task(prompt=prompt, guidance_scale=1.0)))
        return len(calls) - before

    for n in range(11):
        assert forwards(str(n)) == 1
    assert forwards("1") == 0  # ten fit
    assert forwards("0") == 1  # the eleventh drove the first out, and now this one the second oldest
    assert forwards("2") == 1
    three_pieces = "a " * 200
    assert forwards(three_pieces) == 1
    assert forwards(three_pieces) == 0
    assert sum(rows.nbytes for rows in prompts._cache.values()) == prompts._cached_bytes <= 10 * piece_bytes
    too_long = "a " * 75 * 11
    assert forwards(too_long) == forwards(too_long) > 0
    hook.remove()


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_a_long_prompt_is_encoded_a_few_pieces_at_a_time(zoo: Zoo, clip_skip: int | None) -> None:
    letters = ("abcdefgh" * 190)[: 75 * 20]
    sizes = []
    hook = zoo.base.text_encoder.embeddings.register_forward_hook(lambda *call: sizes.append(call[2].shape[0]))
    whole = encoded(zoo.base, " ".join(letters), clip_skip)
    hook.remove()
    assert sizes == [8, 8, 4]
    pieces = [encoded(zoo.base, " ".join(letters[begin : begin + 75]), clip_skip) for begin in range(0, 75 * 20, 75)]
    torch.testing.assert_close(whole, torch.cat(pieces, dim=1))
