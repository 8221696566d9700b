"""Vision-language models used for text: trained inside their own class, merged with all their parts, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.example import Example
from llmtune.errors import FieldError, ProofError
from llmtune.evaluation.generate import answer_losses
from llmtune.files import read_json
from llmtune.merging import step as merging
from llmtune.merging.shards.merge import merge_by_shards
from llmtune.merging.untouched import beyond_text, count_kept
from llmtune.model.base import Base, build_skeleton, load_model, model_facts
from llmtune.model.blocks import decoder, distances, text_model
from llmtune.model.kinds import WRAPPERS, check_kind
from tests.support import ROOT, runs, training, wrappers
from tests.support.cached import GRADUAL, LORA, assert_equal, fit
from tests.training.test_joined import padding, plainly

IDS = torch.arange(20, 44).view(2, 12)
MASK = torch.ones_like(IDS)
MASK[1, 8:] = 0


def logits(model: Any) -> torch.Tensor:
    """The logits of two rows of text, the second one padded."""
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=IDS, attention_mask=MASK).logits)


def as_text_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """The text model of a vision-language model in a class of its own, where transformers has one."""
    text = decoder(text_model(model)) if text_model(model).get_output_embeddings() else text_model(model)
    if type(text.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    alone: PreTrainedModel = AutoModelForCausalLM.from_config(text.config, dtype=torch.float32).eval()
    decoder(alone).load_state_dict(text.state_dict())
    alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return alone


FAST = "qwen2_5_vl"
EVERY = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != FAST)) for kind in WRAPPERS]


@pytest.mark.parametrize("kind", EVERY)
def test_text_trains_inside_the_wrapper_and_merging_keeps_the_rest(kind: str, tmp_path: Path) -> None:
    original = wrappers.model(kind)
    original.save_pretrained(tmp_path / "base")
    base = Base(tmp_path / "base", "tiny", None, None)
    skeleton, model = build_skeleton(base), load_model(base)
    assert type(skeleton) is type(model) is type(original)
    expected, alone = logits(model), as_text_model(model)
    assert torch.equal(expected, logits(original))
    assert alone is None or torch.equal(expected, logits(alone))
    assert torch.equal(expected, model.get_output_embeddings()(decoder(model)(input_ids=IDS, attention_mask=MASK)[0]))
    changed = IDS.clone()
    changed[:, 7] = 99
    later = model(input_ids=changed, attention_mask=MASK).logits
    torch.testing.assert_close(later[:, :7], expected[:, :7], rtol=0, atol=1e-6)
    outside = set(dict(model.named_parameters())) - set(distances(model))
    assert outside == set(dict(skeleton.named_parameters())) - set(distances(skeleton))
    assert outside
    beyond = beyond_text(model, distances(model))
    method = training.spec({"kind": "full", "lr": 0.01, "adapter": {"kind": "lora", "rank": 4}}).method
    plan = method.plan(model_facts(model))
    tuned = insert(model, method.adapter, plan, base)
    tensors = trained_tensors(tuned, plan)
    assert not any(name.split(".lora")[0].removeprefix("base_model.model.") in outside for name in tensors)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.full_like(tensor, 0.05))
    live = logits(tuned)
    assert not torch.equal(live, expected)
    save_delta(tuned, dict(tensors), tmp_path / "delta", base, "lora")
    assert read_json(tmp_path / "delta" / "base.json")["loaded_by"] == "AutoModelForImageTextToText"
    stock = AutoModelForImageTextToText.from_pretrained(base.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(stock, tmp_path / "delta").eval()), live)
    merged = merge_by_shards(base, tmp_path / "delta", IDS.tolist(), torch.float32)
    (tmp_path / "merged").mkdir()
    merged.write(tmp_path / "merged", base)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(reloaded) is type(original)
    torch.testing.assert_close(logits(reloaded), live, rtol=0, atol=1e-4)
    assert set(merged.beyond_text()) == set(beyond)
    assert count_kept(beyond, base, tmp_path / "merged", torch.float32) > 0
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert set(before) == set(after)
    assert sum(not torch.equal(after[name], tensor) for name, tensor in before.items()) >= 4
    kept = original.state_dict()
    assert all(torch.equal(reloaded.state_dict()[name], kept[name]) for name in outside)


def test_every_type_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [kind for kind in WRAPPERS if f"`{kind}`" not in text] == []
    assert list(WRAPPERS) == sorted(WRAPPERS)


@pytest.mark.slow
def test_every_other_type_is_refused_in_one_line() -> None:
    listed = {config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    assert set(WRAPPERS) < listed
    # To transformers, Git is a causal language model in a class of its own, whole.
    for kind in sorted(listed - {*WRAPPERS, "git"}):
        with pytest.raises(FieldError) as caught:
            check_kind(AutoConfig.for_model(kind), "base")
        assert "\n" not in str(caught.value), kind
        assert len(str(caught.value)) < 400


def test_images_give_the_same_features_after_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = wrappers.save_base(tmp_path / "base", "qwen3_5")
    # Qwen3.5 is stored with a head for several tokens, which transformers does not load.
    stored = load_file(base / "model.safetensors") | {"mtp.fc.weight": torch.randn(32, 64)}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    runs.reload_here(monkeypatch)
    run = runs.trained(tmp_path, {"kind": "full", "lr": 1e-3}, base=base, merge={"dtype": "float32"})
    facts, merged = merging.merge(run), load_file(run.merged / "model.safetensors")
    kept = {name for name, tensor in stored.items() if "visual" in name or "mtp" in name}
    assert facts["kept"] == len(kept) == len(stored) - facts["changed"]
    assert all(torch.equal(merged[name], stored[name]) for name in kept)
    grid, pixels = torch.tensor([[1, 4, 4]]), torch.linspace(-1, 1, 16 * 1176).view(16, 1176)
    models = [AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (base, run.merged)]
    assert [type(one).__name__ for one in models] == ["Qwen3_5ForConditionalGeneration"] * 2
    with torch.no_grad():
        ours, theirs = (one.get_image_features(pixels, grid).pooler_output[0] for one in models)
        image = {
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0]]),
        }
        token = models[1].config.image_token_id
        seen, unseen = (models[1](torch.tensor([[20, *[token] * 4, 21]]), **given).logits for given in (image, {}))
    assert ours.abs().sum() > 0
    assert torch.equal(ours, theirs)
    assert not torch.equal(seen, unseen)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (run.merged / name).read_bytes() == (base / name).read_bytes()
    assert read_json(run.merged / "config.json")["architectures"] == ["Qwen3_5ForConditionalGeneration"]


def test_a_tensor_of_the_tower_that_changed_or_is_lost_ends_the_merge(tmp_path: Path) -> None:
    folder = wrappers.save_base(tmp_path / "base", "qwen2_5_vl")
    base, tensors = Base(folder, "tiny", None, None), load_file(folder / "model.safetensors")
    model = load_model(base)
    names = beyond_text(model, distances(model))
    (tmp_path / "merged").mkdir()
    save_file(tensors, tmp_path / "merged/model.safetensors")
    assert count_kept(names, base, tmp_path / "merged", torch.float32) == len(names)
    tensors[names[3]] = tensors[names[3]] * 1.0001
    save_file(tensors, tmp_path / "merged/model.safetensors")
    with pytest.raises(ProofError, match=f"{names[3]}, which text does not pass, changed"):
        count_kept(names, base, tmp_path / "merged", torch.float32)
    del tensors[names[3]]
    save_file(tensors, tmp_path / "merged/model.safetensors")
    with pytest.raises(ProofError, match="is not stored in the merged folder"):
        count_kept(names, base, tmp_path / "merged", torch.float32)


def test_losses_after_shared_tokens_do_not_depend_on_what_was_generated_before() -> None:
    model = wrappers.model("qwen2_5_vl")
    row = Example("a", "", list(range(20, 32)), [-100] * 8 + list(range(28, 32)))
    expected = answer_losses(model, [row, row], 0)
    model.generate(input_ids=IDS.repeat(2, 1), max_new_tokens=1, pad_token_id=0)
    assert answer_losses(model, [row, row], 0) == expected


@pytest.mark.parametrize(
    "kind", ["qwen3_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama4", "qwen2_5_vl"))]
)
def test_joined_rows_and_cached_blocks_match_the_plain_path(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {**GRADUAL, "reaches": [1, "all"], "adapter": LORA}
    ours = fit(tmp_path, method, model=wrappers.model(kind), always=True)
    assert "cached below block 1" in ours[0]
    # Positions of one dimension do not tell Qwen2.5-VL where rows end, so its rows keep their padding.
    assert (padding(ours) == 0) == (kind != "qwen2_5_vl")
    plainly(monkeypatch)
    assert_equal(ours, fit(tmp_path, method, model=wrappers.model(kind), keep=False))
