"""`output_scores` and `output_logits` with a draft equal those of each prompt alone and of stock."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.decoding.test_speculative import GREEDY, PROMPTS, alone
from tests.exactness import left_padded


class TestScores:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 8}

    @pytest.mark.parametrize("rows", [1, 4])
    def test_equal_each_row_alone(self, target, draft, rows):
        """Before and after the processors, with zeros after the end of a row."""
        options = GREEDY | self.options | {"repetition_penalty": 1.5}
        options["eos_token_id"] = [
            alone(target, prompt, repetition_penalty=1.5, max_new_tokens=4)[3] for prompt in PROMPTS[:2]
        ]
        output = target.generate(
            **left_padded(PROMPTS[:rows]), assistant_model=draft, num_assistant_tokens=4, **options
        )
        lengths = set()
        for row, prompt in enumerate(PROMPTS[:rows]):
            plain = target.generate(torch.tensor([prompt]), **options)
            for name in ("scores", "logits"):
                found, expected = torch.stack(output[name])[:, row], torch.cat(plain[name])
                assert found.dtype == torch.float32
                torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=1e-4)
                assert not found[len(expected) :].any()
            lengths.add(len(expected))
        assert len(output.scores) == len(output.logits) == max(lengths)
        assert len(lengths) > 1 or rows == 1, "rows must end at different places for this to show anything"

    def test_as_stock_assisted_generation_gives_them(self, target, draft):
        stock, stock_draft = (LlamaForCausalLM(target.config.to_llama()).eval() for _ in range(2))
        stock.load_state_dict(target.state_dict())
        stock_draft.load_state_dict(draft.state_dict())
        stock.generation_config.eos_token_id = None
        batch, options = left_padded(PROMPTS[:1]), GREEDY | self.options | {"no_repeat_ngram_size": 2}
        expected = stock.generate(**batch, assistant_model=stock_draft, **options)
        found = target.generate(**batch, assistant_model=draft, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("scores", "logits"):
            assert isinstance(found[name], tuple) and isinstance(expected[name], tuple)
            torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-4)

    def test_of_samples(self, target, draft):
        options = {"do_sample": True, "temperature": 0.5, "top_k": 0, "num_return_sequences": 2}
        batch = left_padded(PROMPTS[:2])
        output = target.generate(**batch, assistant_model=draft, pad_token_id=0, **options, **self.options)
        assert len(output.logits) == 8 and output.logits[0].shape == (4, 128)
        torch.testing.assert_close(torch.stack(output.scores), torch.stack(output.logits) / 0.5)

    def test_only_where_they_are_asked_for(self, target, draft):
        arguments = (
            left_padded(PROMPTS[:2]) | GREEDY | {"assistant_model": draft, "max_new_tokens": 3, "output_scores": True}
        )
        assert isinstance(target.generate(**arguments), torch.Tensor)
        output = target.generate(**arguments, return_dict_in_generate=True)
        assert output.logits is None and len(output.scores) == 3
