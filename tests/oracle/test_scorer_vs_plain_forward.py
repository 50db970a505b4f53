"""The scorer against an independent one: transformers' own forward, one unpadded row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES, RECURRENT, VOCAB, recurrent_model, tiny_model
from torch import Tensor

from alignment.modeling import packing, scorer
from alignment.modeling.attention import SeamsLost, recomputed_alike
from alignment.modeling.backbone import Backbone
from alignment.modeling.packing import plan_micro_batches
from alignment.modeling.scorer import choose_layout, packing_fault, predicting_states, score
from alignment.modeling.seams import Piece
from alignment.types import AlignmentError, Sample, SamplingParams


def random_samples(n_prompts: int = 3, group: int = 3, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    samples = []
    for p in range(n_prompts):
        prompt = tokens(4 + 5 * p)
        for g in range(group):
            completion = tokens(1 + 4 * g + p)
            samples.append(Sample(prompt, completion, (True,) * len(completion)))
    return samples


def plain_logprobs(model, sample: Sample) -> Tensor:
    """log p of each completion token from `model(input_ids).logits` of the one row."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
    chosen = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return chosen[len(sample.prompt_ids) - 1 :]


def gradients(model) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "attention", ["default", "small chunks", "short pieces", "block masks", "eager"]
)
def test_i25_packed_equals_one_by_one_in_values_and_gradients(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "short pieces":  # completions apart from their prompts
        monkeypatch.setattr(packing, "PIECE_TOKENS", 9)
    if attention == "small chunks":  # the last of them not full
        monkeypatch.setattr(scorer, "CHUNK", 7)
    model = tiny_model(family)
    runs_sdpa = model.config._attn_implementation == "sdpa"
    if attention == "eager":
        if model.config._attn_implementation == "eager":
            pytest.skip("eager is this family's default")
        model.set_attn_implementation("eager")
    samples = random_samples()
    weights = torch.randn(len(samples), max(len(s.completion_ids) for s in samples))
    backbone = Backbone(model)
    assert backbone.cuts_at_seams == (runs_sdpa and attention != "eager")
    if attention == "block masks":
        backbone.cuts_at_seams = False
    assert backbone.plain_reason is None and packing_fault(backbone) is None

    scores = score(backbone, samples)
    (scores.logprobs * weights).sum().backward()
    packed_gradients = gradients(model)

    expected = [plain_logprobs(model, s) for s in samples]
    sum((e * weights[i, : len(e)]).sum() for i, e in enumerate(expected)).backward()
    plain_gradients = gradients(model)

    for i, row in enumerate(expected):
        torch.testing.assert_close(scores.logprobs[i, : len(row)], row, atol=1e-5, rtol=0)
        assert not scores.logprobs[i, len(row) :].any()
    assert packed_gradients.keys() == plain_gradients.keys()
    scale = max(float(g.abs().max()) for g in plain_gradients.values())
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], gradient, atol=1e-5 * max(scale, 1.0), rtol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_layers_computed_again_attend_as_they_did(family: str) -> None:
    """Activation checkpointing runs layers a second time, after the forward pass is over."""
    model = tiny_model(family)
    samples = random_samples()
    score(Backbone(model), samples).logprobs.sum().backward()
    expected = gradients(model)
    context_fn = recomputed_alike(model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    model.train()
    score(Backbone(model), samples).logprobs.sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def test_pieces_are_whole_completions_with_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 4 and 9 tokens, each with three completions of 0, 4, 8 or 1, 5, 9 input tokens."""
    monkeypatch.setattr(packing, "PIECE_TOKENS", 10)
    packed = packing.pack(random_samples(n_prompts=2), cut_at_seams=True)
    assert packed.seams == (
        Piece(8, None, causal=False),  # the first prompt with its completions of 0 and 4
        Piece(8, (0, 4), causal=False),  # its third one
        Piece(10, None, causal=True),  # the second prompt with its first completion
        Piece(5, (2, 9), causal=False),
        Piece(9, (2, 9), causal=False),
    )


def test_a_row_cut_at_its_seams_has_no_padding() -> None:
    samples = random_samples()
    prompts = {s.prompt_ids for s in samples}
    tokens = sum(map(len, prompts)) + sum(len(s.completion_ids) - 1 for s in samples)
    assert score(Backbone(tiny_model()), samples).n_tokens == tokens


def test_layers_that_lose_the_seams_get_block_masks() -> None:
    model = tiny_model()
    backbone = Backbone(model)
    whole = backbone.decoder.forward
    backbone.decoder.forward = lambda seams=None, **inputs: whole(**inputs)
    with pytest.raises(SeamsLost, match="not told where packed rows are cut"):
        score(backbone, random_samples())
    choose_layout(backbone)
    assert not backbone.cuts_at_seams and backbone.plain_reason is None
    sample = random_samples()[4]
    row = score(backbone, random_samples()).logprobs[4, : len(sample.completion_ids)]
    torch.testing.assert_close(row, plain_logprobs(model, sample), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_and_padded_rows_give_the_same(family: str) -> None:
    model = tiny_model(family)
    samples = random_samples()
    whole = score(Backbone(model), samples)
    plain = Backbone(model)
    plain.plain_reason = "test"
    torch.testing.assert_close(score(plain, samples).logprobs, whole.logprobs, atol=1e-5, rtol=0)
    for budget in (1, 20, 50, 10_000):
        plan = plan_micro_batches(samples, budget)
        assert sorted(i for batch in plan for i in batch) == list(range(len(samples)))
        for batch in plan:
            part = score(Backbone(model), [samples[i] for i in batch])
            for row, i in enumerate(batch):
                n = len(samples[i].completion_ids)
                torch.testing.assert_close(
                    part.logprobs[row, :n], whole.logprobs[i, :n], atol=1e-5, rtol=0
                )


def test_shared_prompts_are_computed_once() -> None:
    model = tiny_model()
    prompt = tuple(range(3, 43))
    samples = [Sample(prompt, (5, 6, 7), (True,) * 3) for _ in range(8)]
    assert score(Backbone(model), samples).n_tokens <= 512
    tokens = len(prompt) + 8 * 2
    assert plan_micro_batches(samples, tokens) == [list(range(8))]
    assert len(plan_micro_batches(samples, tokens, share_prompts=False)) > 1


def test_i39_planted_token_logprob_is_at_its_own_place() -> None:
    """A model whose next token is always (token + 1): only the successor has log-probability 0."""
    model = tiny_model("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, 32))
        head = torch.zeros(VOCAB, 32)
        for v in range(31):
            head[v + 1, v] = 50.0
        model.lm_head.weight.copy_(head)
    sample = Sample((3, 4), (5, 6, 9, 10), (True,) * 4)
    logprobs = score(Backbone(model), [sample]).logprobs[0]
    assert logprobs[0] > -1e-6 and logprobs[1] > -1e-6 and logprobs[3] > -1e-6
    assert logprobs[2] < -100


def test_i10_temperature_and_entropy_follow_the_closed_form() -> None:
    model = tiny_model()
    sample = random_samples(1, 1)[0]
    sampling = SamplingParams(max_new_tokens=8, temperature=0.6)
    scores = score(Backbone(model), [sample], sampling=sampling, entropy=True, greedy=True)
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logits = (
        model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].double()
    )
    tempered = (logits / 0.6).log_softmax(-1)
    target = torch.tensor(sample.completion_ids)
    torch.testing.assert_close(
        scores.logprobs[0].double(), tempered.gather(-1, target[:, None])[:, 0], atol=1e-5, rtol=0
    )
    entropy = -(tempered.exp() * tempered).sum(-1)
    torch.testing.assert_close(scores.entropies[0].double(), entropy, atol=1e-5, rtol=0)
    assert scores.greedy[0].tolist() == (logits.argmax(-1) == target).tolist()


def test_logits_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass too, which computes them a second time."""
    monkeypatch.setattr(scorer, "CHUNK", 7)
    model, samples = tiny_model(), random_samples()
    states = predicting_states(Backbone(tiny_model(seed=1)), samples)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.numel() // VOCAB)
    )
    scores = score(Backbone(model), samples, entropy=True, reference=states)
    chunks = math.ceil(sum(len(s.completion_ids) for s in samples) / 7)
    assert len(rows) == chunks == 8
    assert scores.full_kl is not None
    (scores.logprobs.sum() + scores.full_kl.sum()).backward()
    assert max(rows) == 7
    assert len(rows) > chunks


@pytest.mark.parametrize("chunk", [scorer.CHUNK, 7])
def test_full_kl_equals_the_sum_over_the_vocabulary(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "CHUNK", chunk)
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    samples = random_samples(2, 2)
    states = predicting_states(Backbone(reference), samples)
    kl = score(Backbone(policy), samples, reference=states).full_kl
    for i, sample in enumerate(samples):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        p, q = (
            m(input_ids=ids, use_cache=False)
            .logits[0, len(sample.prompt_ids) - 1 : -1]
            .double()
            .log_softmax(-1)
            for m in (policy, reference)
        )
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(kl[i, : len(expected)].double(), expected, atol=1e-5, rtol=0)


def test_i24_log_softmax_is_float32_in_a_bfloat16_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    samples = random_samples(1, 2)
    scores = score(Backbone(model), samples)
    assert scores.logprobs.dtype == torch.float32
    hidden = predicting_states(Backbone(model), samples).hidden
    logits = torch.nn.functional.linear(hidden, model.lm_head.weight).float()
    targets = torch.tensor([t for s in samples for t in s.completion_ids])
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    got = torch.cat([scores.logprobs[i, : len(s.completion_ids)] for i, s in enumerate(samples)])
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_i25_a_model_that_ignores_the_mask_falls_back_to_plain_rows() -> None:
    model = tiny_model()
    backbone = Backbone(model)
    backbone.cuts_at_seams = False
    backbone.masks = lambda allowed, q, k: None  # type: ignore[method-assign]
    choose_layout(backbone)
    assert "see each other" in (backbone.plain_reason or "")


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_architectures_take_plain_rows(family: str) -> None:
    model = recurrent_model(family)
    backbone = Backbone(model)
    assert backbone.plain_reason is not None
    samples = random_samples()
    scores = score(backbone, samples)
    scores.logprobs.sum().backward()
    padded_gradients = gradients(model)
    expected = [plain_logprobs(model, s) for s in samples]
    sum(e.sum() for e in expected).backward()
    for i, row in enumerate(expected):
        torch.testing.assert_close(scores.logprobs[i, : len(row)], row, atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        scale = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(padded_gradients[name], gradient, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_equals_transformers(family: str) -> None:
    model = tiny_model(family)
    sample = random_samples(1, 1)[0]
    loss = score(Backbone(model), [sample], router_loss=True).aux_loss
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids[:-1]])
    out = model(input_ids=ids, output_router_logits=True, use_cache=False)
    # transformers concatenates the layers before averaging; with one row per layer of equal
    # length that is the loss of the pooled statistics, so compare layer by layer.
    expected = []
    for layer in out.router_logits:
        p = layer.detach().reshape(-1, layer.shape[-1]).double().softmax(-1)
        top = p.topk(2, -1).indices
        f = torch.stack([(top == e).any(-1).double().mean() for e in range(p.shape[-1])])
        expected.append(p.shape[-1] * (f * p.mean(0)).sum())
    assert loss.detach().item() == pytest.approx(float(sum(expected) / len(expected)), abs=1e-5)


def test_dense_model_has_no_router_loss() -> None:
    with pytest.raises(AlignmentError, match="router_aux_coef"):
        score(Backbone(tiny_model()), random_samples(1, 1), router_loss=True)


def test_empty_prompt_and_completion_are_refused() -> None:
    backbone = Backbone(tiny_model())
    with pytest.raises(AlignmentError, match="sample 0 has an empty prompt"):
        score(backbone, [Sample((), (3,), (True,))])
    with pytest.raises(AlignmentError, match="sample 0 has an empty completion"):
        score(backbone, [Sample((3,), (), ())])


def test_entropy_gradient_follows_the_closed_form() -> None:
    model = tiny_model()
    sample = random_samples(1, 1)[0]
    score(Backbone(model), [sample], entropy=True, entropy_gradient=True).entropies.sum().backward()
    mine = gradients(model)
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
    log_p = logits.log_softmax(-1)
    (-(log_p.exp() * log_p).sum()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-4)


def test_truncated_support_keeps_the_sampled_token() -> None:
    """A token just outside the top-k stays scorable, with the others renormalised around it."""
    model = tiny_model()
    sample = random_samples(1, 1)[0]
    sampling = SamplingParams(max_new_tokens=8, top_k=2)
    scores = score(Backbone(model), [sample], sampling=sampling, entropy=True)
    assert scores.logprobs.isfinite().all() and scores.entropies.isfinite().all()
    assert (scores.entropies <= torch.tensor(3.0).log() + 1e-6).all()
