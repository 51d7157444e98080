"""Small models with known distributions, and a chi-square test. Needs torch and transformers only."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


VOCABULARY, CONTEXT = 24, 2048


def model(seed: int, *, reads_only_the_last_token: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        if reads_only_the_last_token and name.endswith("o_proj.weight"):
            parameter.data.zero_()
    made.lm_head.weight.data *= 2
    made.generation_config.eos_token_id = None
    return made


def similar(target: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Returns a draft with another distribution, which is right in part."""
    torch.manual_seed(seed)
    draft = LlamaForCausalLM(target.config).eval()
    draft.load_state_dict(target.state_dict())
    draft.lm_head.weight.data += 0.25 * torch.randn_like(draft.lm_head.weight)
    return draft


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Returns the sampling distribution `[..., vocab]` by definition, in float64."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(dim=-1, descending=True)
    ranked = p.gather(-1, order)
    if top_k:
        ranked[..., top_k:] = 0
        ranked /= ranked.sum(-1, keepdim=True)
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.where(before < top_p, 0.0)
    p = torch.zeros_like(p).scatter(-1, order, ranked)
    return p / p.sum(-1, keepdim=True)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the p-value of a chi-square test over `[groups, classes]`; rare classes are merged."""
    assert counts[expected == 0].sum() == 0, "something was drawn that has no probability"
    statistic, degrees = 0.0, 0
    for observed, wanted in zip(counts.double(), expected.double(), strict=True):
        common = wanted >= 5
        observed = torch.cat([observed[common], observed[~common].sum()[None]])
        wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
        if wanted[-1] < 5:
            observed, wanted = observed[:-1], wanted[:-1]
        if len(wanted) > 1:
            statistic += ((observed - wanted) ** 2 / wanted).sum().item()
            degrees += len(wanted) - 1
    assert degrees > 20
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), torch.tensor(statistic / 2)).item()
