import pytest
import torch

from serve_app.engine.prompt_weights import parse_weights
from serve_app.engine.prompts import PromptEncoder, encode_prompt
from serve_app.errors import JobError
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


def test_sdxl_reads_the_last_but_one_layer_of_both_encoders(zoo: Zoo) -> None:
    base = zoo.families["xl"]
    found = encode_prompt(base, parse_weights("a fox"), None)
    states = []
    for tokenizer, encoder in base.text_encoders:
        ids = tokenizer("a fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
        states.append(encoder(ids, output_hidden_states=True))
    assert found.text.shape == (1, 77, 40)
    torch.testing.assert_close(found.text, torch.cat([each.hidden_states[-2] for each in states], dim=-1))
    assert found.pooled is not None
    torch.testing.assert_close(found.pooled, states[1].text_embeds)


def test_the_pooled_text_of_a_long_prompt_is_that_of_its_first_piece(zoo: Zoo) -> None:
    letters = "abcdefgh" * 10
    whole = encode_prompt(zoo.families["xl"], parse_weights(" ".join(letters)), None)
    first, second = (
        encode_prompt(zoo.families["xl"], parse_weights(" ".join(part)), None) for part in (letters[:75], letters[75:])
    )
    assert whole.pooled is not None
    assert first.pooled is not None
    torch.testing.assert_close(whole.text, torch.cat([first.text, second.text], dim=1))
    torch.testing.assert_close(whole.pooled, first.pooled)


def test_sizes_are_in_the_order_of_diffusers(zoo: Zoo) -> None:
    said = PromptEncoder().rows(request(zoo, task(model="xl", family="sdxl", width=96, height=64)))
    assert said.sizes is not None
    assert said.sizes.tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert PromptEncoder().rows(request(zoo, task())).sizes is None


def test_an_empty_negative_prompt_is_zeros_as_long_as_the_prompt(zoo: Zoo) -> None:
    said = PromptEncoder().rows(request(zoo, task(model="xl", family="sdxl", prompt="a " * 80, negative_prompt=" ")))
    assert said.text.shape == (2, 154, 40)
    assert said.pooled is not None
    assert not said.text[0].any()
    assert not said.pooled[0].any()
    assert said.pooled[1].all()


def test_more_layers_than_there_are_cannot_be_skipped(zoo: Zoo) -> None:
    """Three layers; SDXL's encoders have four, and it starts at the last but one."""
    for model, family in (("base", "sd15"), ("xl", "sdxl")):
        PromptEncoder().rows(request(zoo, task(model=model, family=family, clip_skip=3)))
        with pytest.raises(JobError, match=f"clip_skip 4 is too large: the model '{model}' allows 1 to 3"):
            PromptEncoder().rows(request(zoo, task(model=model, family=family, clip_skip=4)))


def test_the_cache_counts_pooled_texts_too(zoo: Zoo) -> None:
    piece_bytes = (77 * 40 + 20) * 4
    prompts = PromptEncoder(cache_bytes=2 * piece_bytes)
    for prompt in "abc":
        prompts.rows(request(zoo, task(model="xl", family="sdxl", prompt=prompt, guidance_scale=1.0)))
    assert [key[2] for key in prompts._cache] == ["b", "c"]
    assert prompts._cached_bytes == 2 * piece_bytes


@pytest.mark.parametrize("model", ["base", "xl"])
def test_weights_move_their_tokens_alone(zoo: Zoo, model: str) -> None:
    base = zoo.model(model)
    prompts = PromptEncoder()

    def text(prompt: str) -> torch.Tensor:
        return prompts._encode(base, prompt, None).text[0]

    plain, empty = text("a fox sat"), text("")
    heavy = text("a (fox:1.5) sat")  # the start token, "a", then three letters
    torch.testing.assert_close(heavy[2:5], empty[2:5] + 1.5 * (plain[2:5] - empty[2:5]))
    assert torch.equal(heavy[:2], plain[:2])
    assert torch.equal(heavy[5:], plain[5:])
    torch.testing.assert_close(text("a (fox:0) sat")[2:5], empty[2:5])
    assert torch.equal(text("a (fox:1) sat"), plain)
    assert torch.equal(text("a f(ox:1.5) sat")[3:5], heavy[3:5])  # inside a word
    assert torch.equal(text("a f(ox:1.5) sat")[:3], plain[:3])


def test_weights_hold_across_pieces(zoo: Zoo) -> None:
    """Sixty letters, then thirty heavy ones: 15 of these are in the first piece."""
    prompts = PromptEncoder()
    plain = prompts._encode(zoo.base, "a " * 60 + "b " * 30, None).text[0]
    heavy = prompts._encode(zoo.base, "a " * 60 + "(" + "b " * 30 + ":2)", None).text[0]
    moved = (plain != heavy).any(dim=1).nonzero().flatten().tolist()
    assert moved == [*range(61, 76), *range(78, 93)]
    empty = prompts._encode(zoo.base, "", None).text[0]
    torch.testing.assert_close(heavy[78:93], 2 * plain[78:93] - empty[1:16])


def test_a_weighted_prompt_is_kept_apart(zoo: Zoo) -> None:
    asked = [request(zoo, task(prompt=prompt)) for prompt in ("a fox", "a (fox:1.3)", "a (fox:1.4)")]
    prompts = PromptEncoder()
    for _ in range(2):
        first, second, third = (prompts.rows(each).text[1] for each in asked)
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
