"""Invariants of the policy, its reference and its optimizer (rows 1, 2, 12, 19 to 23, 42, 44)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model
from torch import nn

from alignment.modeling.optimizer import AdamWOptions, MasterWeightOptimizer, learning_rate
from alignment.modeling.policy import PolicyWithReference, disable_dropout, updating
from alignment.modeling.reference import make_reference, trainable
from alignment.types import Sample, UserInputError


def samples(n: int = 6, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        prompt = tuple(range(3 + i // 2, 9 + i // 2))
        length = 2 + i
        tokens = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        out.append(Sample(prompt, tuple(tokens), tuple(t % 3 != 0 for t in range(length))))
    return out


def lora(model: nn.Module, **options: object) -> nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def fill_adapter(model: nn.Module) -> None:
    """Stand in for SFT: an adapter that already changes the policy."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)


def max_gap(policy: PolicyWithReference) -> float:
    own = policy.logprobs(samples(), 64)
    ref = policy.logprobs(samples(), 64, of_reference=True)
    return max(float((a - b).abs().max()) for a, b in zip(own, ref, strict=True))


def train_step(policy: PolicyWithReference, lr: float = 1e-2, **options: object) -> float:
    optimizer = MasterWeightOptimizer(trainable(policy.model), AdamWOptions(lr=lr), **options)
    with updating(policy):
        scores = policy(samples())
    (-scores.logprobs[scores.mask].sum()).backward()
    optimizer.clip_(1.0)
    return optimizer.step()


CASES = {
    "full, frozen copy": ("full", "frozen_copy", {}),
    "full, synced": ("full", "synced", {"every": 2}),
    "fresh LoRA, adapter off": ("fresh", "adapter_off", {}),
    "fresh LoRA, frozen copy": ("fresh", "frozen_copy", {}),
    "SFT LoRA, adapter off": ("sft", "adapter_off", {}),
    "SFT LoRA, synced": ("sft", "synced", {"every": 2, "mix": 0.5}),
    "changed in memory": ("changed", "frozen_copy", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_i19_reference_is_the_policy_as_handed_over(case: str, dtype: torch.dtype) -> None:
    kind, mode, options = CASES[case]
    model = tiny_model().to(dtype) if kind == "full" else tiny_model()
    if kind in ("fresh", "sft"):
        model = lora(model).to(dtype)
    if kind == "sft":
        fill_adapter(model)
    if kind == "changed":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model = model.to(dtype)
    policy = PolicyWithReference(model, make_reference(model, mode, **options))
    assert max_gap(policy) == 0.0
    before = policy.logprobs(samples(), 64, of_reference=True)
    train_step(policy)
    policy.reference.after_step(1)
    assert max_gap(policy) > 1e-4
    after = policy.logprobs(samples(), 64, of_reference=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_i19_synced_reference_follows_by_its_rule() -> None:
    model = tiny_model()
    start = {n: p.detach().clone() for n, p in trainable(model).items()}
    policy = PolicyWithReference(model, make_reference(model, "synced", every=2, mix=0.25))
    train_step(policy)
    policy.reference.after_step(1)
    kept = policy.reference.state_dict()
    assert all(torch.equal(kept[n], start[n]) for n in start)
    policy.reference.after_step(2)
    for name, parameter in trainable(model).items():
        expected = 0.75 * start[name] + 0.25 * parameter.detach()
        torch.testing.assert_close(policy.reference.state_dict()[name], expected)


def test_i20_base_weights_are_bit_identical_after_reference_scoring() -> None:
    model = lora(tiny_model().to(torch.bfloat16))
    fill_adapter(model)
    policy = PolicyWithReference(model, make_reference(model, "adapter_off"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        policy.logprobs(samples(), 64, of_reference=True)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_i21_a_policy_without_trainable_tensors_is_refused() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(UserInputError, match="no trainable parameter"):
        PolicyWithReference(model, None)


@pytest.mark.parametrize("mode", ["adapter_off", "frozen_copy"])
def test_a_fixed_reference_saves_nothing_and_refuses_a_moving_ones_state(mode: str) -> None:
    reference = make_reference(lora(tiny_model()), mode)
    assert reference.state_dict() == {}
    reference.load_state_dict({})
    moving = make_reference(tiny_model(), "synced").state_dict()
    with pytest.raises(UserInputError, match=f"moving reference.*{mode}"):
        reference.load_state_dict(moving)


def test_adapter_off_without_adapter_is_refused() -> None:
    with pytest.raises(UserInputError, match="frozen_copy"):
        make_reference(tiny_model(), "adapter_off")


def test_i12_no_dropout_outside_the_update() -> None:
    model = lora(tiny_model(), lora_dropout=0.5)
    fill_adapter(model)
    model.train()
    policy = PolicyWithReference(model, None)
    first, second = policy.logprobs(samples(), 64), policy.logprobs(samples(), 64)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with updating(policy), torch.no_grad():
        noisy = policy(samples()).logprobs
    assert not torch.equal(noisy, policy(samples()).logprobs.detach())
    disable_dropout(model)
    with updating(policy), torch.no_grad():
        quiet = policy(samples()).logprobs
    assert torch.equal(quiet, policy(samples()).logprobs.detach())


@pytest.mark.parametrize("budget", [12, 25, 1000])
def test_i01_gradient_does_not_depend_on_micro_batches(budget: int) -> None:
    model = tiny_model()
    policy = PolicyWithReference(model, None)
    rows = samples()
    count = sum(s.n_loss_tokens for s in rows)
    optimizer = MasterWeightOptimizer(trainable(model), AdamWOptions(lr=1e-3))
    for batch in policy.plan(rows, budget):
        scores = policy([rows[i] for i in batch])
        (-scores.logprobs[scores.mask].sum() / count).backward()
    accumulated = [g.clone() for g in optimizer.gradients]
    model.zero_grad()
    # The oracle: one row at a time through transformers' own forward.
    total = torch.zeros(())
    for sample in rows:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        own = logprobs.gather(-1, ids[0, 1:, None])[len(sample.prompt_ids) - 1 :, 0]
        total = total - own[torch.tensor(sample.loss_mask)].sum() / count
    total.backward()
    for mine, parameter in zip(accumulated, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)


def test_i02_masters_sum_gradients_in_float32() -> None:
    """Two thousand micro-batches of 1e-4 onto a bf16 weight: bf16 would stop at about 0.03."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterWeightOptimizer({"w": parameter}, AdamWOptions(lr=1e-3))
    for _ in range(2000):
        (parameter.float() * 1e-4).sum().backward()
    assert parameter.grad is None
    torch.testing.assert_close(optimizer.gradients[0], torch.full((4,), 0.2), rtol=2e-3, atol=0)


def test_i23_masters_keep_small_updates_that_bfloat16_loses() -> None:
    def moved_after(steps: int, master: torch.dtype | None) -> float:
        parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = MasterWeightOptimizer(
            {"w": parameter}, AdamWOptions(lr=1e-4), master_dtype=master
        )
        for _ in range(steps):
            parameter.float().sum().backward()
            optimizer.step()
        return float((parameter.detach() != 1).float().mean())

    assert moved_after(60, None) == 0.0
    assert moved_after(60, torch.float32) == 1.0


def test_i23_moved_share_is_reported() -> None:
    assert train_step(PolicyWithReference(tiny_model(), None), lr=1e-2) > 0.9
    frozen = train_step(PolicyWithReference(tiny_model().to(torch.bfloat16), None), lr=1e-9)
    assert frozen < 0.05


def test_optimizer_equals_torch_adamw_in_float32_and_restores_exactly() -> None:
    torch.manual_seed(1)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    options = AdamWOptions(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    mine = MasterWeightOptimizer(dict(ours.named_parameters()), options)
    torchs = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    data = torch.randn(4, 5)
    for _ in range(3):
        ours(data).square().sum().backward()
        mine.step()
        theirs.zero_grad()
        theirs(data).square().sum().backward()
        torchs.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    copy = nn.Linear(5, 3)
    copy.load_state_dict(ours.state_dict())
    restored = MasterWeightOptimizer(dict(copy.named_parameters()), options)
    restored.load_state_dict(mine.state_dict())
    for model, optimizer in ((ours, mine), (copy, restored)):
        model(data).square().sum().backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = MasterWeightOptimizer({"w": parameter}, AdamWOptions(lr=1.0))
    (parameter * torch.tensor([3.0, 4.0])).sum().backward()
    assert optimizer.clip_(1.0) == pytest.approx(5.0)
    torch.testing.assert_close(optimizer.gradients[0], torch.tensor([0.6, 0.8]))


def test_learning_rate_schedules_by_hand() -> None:
    def at(step: int, schedule: str, **options: float) -> float:
        return learning_rate(
            step, base=1.0, schedule=schedule, warmup_steps=2, total_steps=6, **options
        )

    assert at(0, "constant") == pytest.approx(1 / 3)
    assert at(1, "constant") == pytest.approx(2 / 3)
    assert at(5, "constant") == 1.0
    assert at(2, "linear") == 1.0 and at(4, "linear") == pytest.approx(0.5)
    assert at(4, "cosine") == pytest.approx(0.5)
    assert at(6, "cosine", min_ratio=0.1) == pytest.approx(0.1)


def test_i17_exact_kl_reads_the_reference_with_its_own_head() -> None:
    """A synced reference shares the policy's modules, whose head has moved on by then."""
    found = []
    for mode in ("frozen_copy", "synced"):
        model = tiny_model(tie_word_embeddings=False)
        policy = PolicyWithReference(model, make_reference(model, mode, every=9))
        with torch.no_grad():
            model.lm_head.weight[::2] *= 1.5
            found.append(policy(samples(), reference=policy.reference_states(samples())).full_kl)
    assert float(found[0].abs().max()) > 0.1
    assert torch.equal(found[0], found[1])
