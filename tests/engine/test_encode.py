import torch
from support.tiny import Zoo, renamed, request, task

from serve_app.engine.encode import PromptEncoder, encode_prompt


def test_a_long_prompt_is_its_pieces_in_a_row(zoo: Zoo) -> None:
    """One letter is one token: 80 letters are a piece of 75 and a piece of 5."""
    letters = " ".join("abcdefgh" * 10)
    whole = encode_prompt(zoo.base, letters, None)
    first = encode_prompt(zoo.base, " ".join(("abcdefgh" * 10)[:75]), None)
    second = encode_prompt(zoo.base, " ".join(("abcdefgh" * 10)[75:]), None)
    assert whole.shape == (1, 154, 16)
    torch.testing.assert_close(whole, torch.cat([first, second], dim=1))


def test_the_shorter_prompt_is_filled_up_with_empty_pieces(zoo: Zoo) -> None:
    rows = PromptEncoder().rows(request(zoo, task(prompt="a b", negative_prompt="word " * 60)))
    empty = encode_prompt(zoo.base, "", None)
    assert rows.shape == (2, 77 * 4, 16)
    torch.testing.assert_close(rows[1:, 77:154], empty)
    torch.testing.assert_close(rows[1:, :77], encode_prompt(zoo.base, "a b", None))


def test_without_guidance_there_is_one_row(zoo: Zoo) -> None:
    assert PromptEncoder().rows(request(zoo, task(guidance_scale=1.0))).shape == (1, 77, 16)


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


def test_the_cache_is_bounded(zoo: Zoo) -> None:
    prompts = PromptEncoder()
    for n in range(300):
        prompts.rows(request(zoo, task(prompt=str(n), guidance_scale=1.0)))
    assert len(prompts._cache) == 256
