"""Ends of one text are scored as each is by itself, and the text is read once."""

from typing import Any

import pytest
import torch

from llmtune.evaluation.generate import answer_losses, shares_start
from llmtune.evaluation.loaded_model import LoadedModel
from llmtune.inference.ends import Question, find_questions, score_ends
from llmtune.inference.room import Room, row_bytes
from tests.evaluation.test_generate import WIDE, example
from tests.support import architectures, tiny
from tests.support.rooms import recorded, set_room

ONE = [[70], [71], [72], [73]]
MIXED = [[80, 81, 82], [80], [90, 80, 85, 86, 87, 88], [80, 81, 83]]
TEXTS = [[1, 40, 41, 42, *range(60, 60 + 7 * n)] for n in (3, 0, 1, 2)]
ROWS = [(text, end) for text, of_text in zip(TEXTS, (ONE, MIXED, MIXED, ONE), strict=True) for end in of_text]
SHARE = ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "granite", "mixtral", "deepseek_v3", "glm4"]


@torch.no_grad()
def alone(model: Any, text: list[int], end: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an end and whether it is greedy, without cache, batch or padding."""
    logits = model(torch.tensor([[*text, *end]])).logits[0, len(text) - 1 : -1]
    likeliest = logits.argmax(-1).tolist()
    return float(logits.double().log_softmax(-1)[torch.arange(len(end)), end].sum()), likeliest == end


def with_greedy_ends(model: Any) -> list[tuple[list[int], list[int]]]:
    """Rows of which some ends are what the model would say."""
    rows = list(ROWS)
    for place, (text, end) in enumerate(ROWS[::3]):
        said: list[int] = []
        for _ in end:
            said.append(int(model(torch.tensor([[*text, *said]])).logits[0, -1].argmax()))
        rows[3 * place] = (text, said)
    return rows


def scores_of(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """What a loaded model answers lm-eval on rows of token ids."""
    lm = LoadedModel(model, tiny.tokenizer(), 8, None, "tiny")
    return lm._loglikelihood_tokens([(("", ""), *row) for row in rows])


@pytest.mark.parametrize("kind", SHARE)
@torch.no_grad()
def test_ends_of_one_text_score_as_each_by_itself(kind: str) -> None:
    model = architectures.model(kind, initializer_range=WIDE).eval()
    assert shares_start(model)
    rows = with_greedy_ends(model)
    expected = [alone(model, *row) for row in rows]
    shapes = recorded(model)
    found = scores_of(model, rows)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    # The shared start, the texts, and the ends behind their first token.
    assert shapes == [(1, 3), (4, 22), (6, 5)]


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "qwen3_5_text", "mamba", "rwkv"])
def test_models_whose_cache_cannot_be_shared_read_every_row_whole(kind: str) -> None:
    model = architectures.model(kind).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # else every end is about as likely
    expected = [alone(model, *row) for row in ROWS]
    shapes = recorded(model)
    found = scores_of(model, ROWS)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(rows for rows, _ in shapes) == 8, "lm-eval reads rows once that differ in their last token alone"
    assert max(tokens for _, tokens in shapes) == len(TEXTS[0])


@torch.no_grad()
def test_ends_of_one_token_take_one_pass() -> None:
    model = tiny.model(initializer_range=WIDE).eval()
    shapes = recorded(model)
    (scores,) = score_ends(model, [Question(TEXTS[0], ONE)])
    assert shapes == [(1, len(TEXTS[0]))]
    assert [-score.loss for score in scores] == pytest.approx([alone(model, TEXTS[0], end)[0] for end in ONE])


def test_losses_read_a_prompt_of_several_answers_once() -> None:
    """Beside rows that have a prompt of their own, or answers that are not learned to their end."""
    model = tiny.model(initializer_range=WIDE).eval()
    rows = [example([*text, *end], len(end)) for text, end in [*ROWS, ([1, 50, 51], [60, 61])]]
    partly = example([*TEXTS[0], 70, 71], 2)
    partly.labels[-1] = -100
    counted: list[float] = []
    shapes = recorded(model)
    losses = answer_losses(model, [*rows, partly], 0, counted.append)
    assert sum(1 for shape in shapes if shape == (4, 22)) == 1
    expected = [-alone(model, row.input_ids[: -row.supervised], row.input_ids[-row.supervised :])[0] for row in rows]
    assert losses == pytest.approx([*expected, -alone(model, TEXTS[0], [70])[0]], rel=1e-5)
    assert sum(counted) == len(losses)


def test_long_requests_lose_their_start_as_in_plain_lm_eval() -> None:
    model = tiny.model(initializer_range=WIDE, max_position_embeddings=16).eval()
    text = list(range(40, 60))
    rows = [(text, end) for end in ([[70], [71], [80, 81, 82], [80, 81, 83]])]
    found = scores_of(model, rows)
    cut = [alone(model, [*text, *end][-17 : -len(end)], end)[0] for _, end in rows]
    assert [score for score, _ in found] == pytest.approx(cut, rel=1e-5)


@torch.no_grad()
def test_questions_that_do_not_fit_together_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(initializer_range=WIDE).eval()
    questions = find_questions(ROWS, model.config)
    whole, shapes = score_ends(model, questions), recorded(model)
    set_room(monkeypatch, Room(4 * row_bytes(model, 10, 15, 10), 128, 2048))
    apart = score_ends(model, questions)
    assert max(rows for rows, _ in shapes) <= 4
    for some, others in zip(apart, whole, strict=True):
        assert [score.loss for score in some] == pytest.approx([score.loss for score in others], rel=1e-5)


def test_rotary_angles_that_a_longer_row_changes_are_not_shared() -> None:
    """As in longrope, whose frequencies are others for rows beyond the length of the first training."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = architectures.model("phi3", rope_parameters=rope, original_max_position_embeddings=12)
    text = list(range(40, 51))
    rows = [(text, end) for end in ([70], [80, 81, 82], [80, 81, 83])]
    (question,) = find_questions([(text[:8], end) for _, end in rows], model.config)
    assert question.places == [0, 1, 2]
    assert find_questions(rows, model.config) == []
