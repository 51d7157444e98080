"""The bugs of the original TinyLlama training, each by its name. Three more lie where what they are about is tested:
`test_regression_floor_equal_to_peak` and `test_regression_rate_follows_tokens_not_steps` (the batch that meant "per
node") in test_schedule.py, `test_regression_every_rank_reads_its_own_share` (files shuffled by rank) in test_loop.py.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretrain.runs import pretrain
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.data import order
from tinyllama_hf.data.mixture import Mixture
from tinyllama_hf.data.order import BlockOrder
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.shards import TokenDataset, read_metadata
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.step import TrainStep
from tinyllama_hf.tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint


def prepared_from(
    texts: list[str], tokenizer: Path, folder: Path, files: int = 1, workers: int = 1, **options
) -> Path:
    """The texts as a prepared data set of `num_files` files."""
    source = folder / "source"
    source.mkdir(parents=True)
    for number in range(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::files])
        (source / f"{number}.jsonl").write_text(lines)
    output = folder / "data"
    prepare([str(source)], tokenizer, output, validation_fraction=0.0, workers=workers, progress=False, **options)
    return output


def test_regression_last_chunk_padded_with_begin_of_sequence(documents, tokenizer_folder, tmp_path):
    """Each process padded its last chunk with <s> and trained on it, up to 2.1M tokens.

    Here one <s> and one </s> are added per document, for any number of files and processes, and nothing else.
    """
    folder = prepared_from(documents, tokenizer_folder, tmp_path, files=5, workers=3)
    tokenizer, data = load_tokenizer(tokenizer_folder), TokenDataset(folder, 16)
    stream = data.tokens(0, data.num_tokens)
    assert (stream == tokenizer.bos_token_id).sum() == (stream == tokenizer.eos_token_id).sum() == len(documents)
    assert not (stream == tokenizer.pad_token_id).any()
    blocks = np.concatenate([data[index][:-1] for index in range(len(data))])
    assert np.array_equal(blocks, stream[: len(blocks)]), "the blocks are the stream, cut"
    assert data.num_tail_tokens == len(stream) - len(blocks) <= 16, "what is left over is reported, not filled up"


class TestSeparatorPolicyChangedThreeTimes:
    """The released models did not learn to stop. Here the separators are recorded with the data, and checked."""

    @pytest.mark.parametrize(("separator", "begins", "ends"), [("both", 1, 1), ("bos", 1, 0), ("eos", 0, 1)])
    def test_regression_the_policy_is_in_the_metadata_and_in_the_tokens(
        self, documents, tokenizer_folder, tmp_path, separator, begins, ends
    ):
        folder = prepared_from(documents, tokenizer_folder, tmp_path, separator=separator)
        assert read_metadata(folder)["separator"] == separator
        stream, tokenizer = TokenDataset(folder, 16).tokens(0, 200), load_tokenizer(tokenizer_folder)
        assert (stream[0] == tokenizer.bos_token_id) == bool(begins)
        counts = Counter(TokenDataset(folder, 16).tokens(0, TokenDataset(folder, 16).num_tokens).tolist())
        assert counts[tokenizer.eos_token_id] == ends * len(documents)

    def test_regression_sources_of_different_policies_do_not_mix(self, documents, tokenizer_folder, tmp_path):
        policies = ("both", "bos", "eos")
        data = {s: prepared_from(documents[:9], tokenizer_folder, tmp_path / s, separator=s) for s in policies}
        fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer_folder))
        for first, second in itertools.product(policies, policies):
            folders = [data[first], data[second]]
            if first == second:
                assert len(Mixture(folders, [0.5, 0.5], 16, 0, fingerprint).sources) == 2
                continue
            with pytest.raises(InputError, match=f"--separator {second}, .* with {first}"):
                Mixture(folders, [0.5, 0.5], 16, 0, fingerprint)

    def test_regression_a_changed_policy_is_another_data_set(self, documents, tokenizer_folder, tmp_path):
        prepared_from(documents, tokenizer_folder, tmp_path)
        with pytest.raises(InputError, match=r"another request \(different: .*separator"):
            prepare(
                [str(tmp_path / "source")], tokenizer_folder, tmp_path / "data", "bos", 0.0, workers=1, progress=False
            )


@pytest.mark.parametrize("files", [1, 3, 9])
def test_regression_fewer_than_eight_files_a_rank(documents, tokenizer_folder, tmp_path, files):
    """IndexError, trailing files that were never read, endless iteration.

    Here one file and any number of processes work, and one epoch reads every block once.
    """
    folder = prepared_from(documents, tokenizer_folder, tmp_path, files=files)
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer_folder))
    mixture = Mixture([folder], [1.0], 16, 7, fingerprint)
    number = len(mixture.sources[0])
    for processes in (1, 2, 16):
        share = -(-number // processes)
        read = [
            block.index
            for rank in range(processes)
            for block in mixture.blocks(rank * share, min(share, number - rank * share))
        ]
        assert sorted(read) == list(range(number))


class TestResumeReplaysTheDataLoader:
    """It took hours and ran into timeouts. Here resuming at step 1 000 000 costs as much as at step 10."""

    def test_regression_the_order_is_found_without_what_came_before(self, monkeypatch):
        blocks = BlockOrder([10**9, 10**8, 10**7], [0.6, 0.3, 0.1], seed=1)
        calls = []
        real = order._DueTimes.time
        monkeypatch.setattr(order._DueTimes, "time", lambda self, m: calls.append(m) or real(self, m))
        costs = []
        for step in (10, 1_000_000):
            calls.clear()
            blocks.blocks(step * 1024, 64)
            costs.append(len(calls))
        assert abs(costs[0] - costs[1]) <= 6, "a few blocks to find the place, then one look for each"

    def test_regression_a_resumed_run_reads_only_what_is_left(self, recipe, monkeypatch):
        import shutil

        config = load_pretrain_config(recipe)
        pretrain(config)
        shutil.rmtree(Path(config.output_dir) / "checkpoints" / "step-12")
        read = []
        real = Mixture.tokens
        monkeypatch.setattr(Mixture, "tokens", lambda self, blocks: read.extend(blocks) or real(self, blocks))
        pretrain(config)
        assert len(read) == (12 - 8) * 8, "the sequences of steps 9 to 12"


class ReadBacks(TorchDispatchMode):
    """Counts operations that make the host wait for the device: reading a scalar, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.found[str(function)] += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.skip_spikes_sigma=3.0"],
        ["training.micro_batch_size=1"],
        ["data.document_masking=true"],
        ["data.document_masking=true", "training.attention=eager"],
    ],
)
def test_regression_loss_read_back_at_every_micro_step(recipe, monkeypatch, overrides):
    """No synchronization between logging steps: within a step, no value is copied to the host."""
    found = []
    real = TrainStep.__call__

    def watched(self, step):
        with ReadBacks() as watch:
            result = real(self, step)
        found.append(watch.found)
        return result

    monkeypatch.setattr(TrainStep, "__call__", watched)
    pretrain(load_pretrain_config(recipe, ["logging.every_steps=6", *overrides]))
    assert found == [Counter()] * 12


def test_transformers_still_looks_for_packed_documents_in_every_batch():
    """The reason for `unpacked_sdpa` (transformers 5.23); when this fails, remove it."""
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512)).train()
    tokens = torch.randint(0, 512, (2, 32))
    with ReadBacks() as watch:
        model(input_ids=tokens, labels=tokens)
    assert watch.found
