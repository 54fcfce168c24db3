"""Two processes that each hold half of the policy (FSDP 1) read token rewards for `test_training_processes`."""

from __future__ import annotations

import copy
import functools

import torch
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import GRPOConfig

from mechreward.reward import FeatureReward
from mechreward.sae import SAE, SAEMeta
from mechreward.training import DenseConfig, MechRewardGRPOTrainer


def main(folder: str, tokenizer: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model, encoder = LlamaForCausalLM(config), torch.randn(32, 64)
    meta = SAEMeta(release="r", sae_id="i", layer=1, model_name="", hook_name="h")
    sae = SAE("topk", encoder, torch.zeros(64), encoder.T.clone(), torch.zeros(32), meta, k=32)
    trainer = MechRewardGRPOTrainer(
        model=model,
        reward_funcs=FeatureReward({3: 1.0, 7: -0.5, 11: 2.0}, sae),
        args=GRPOConfig(
            output_dir=folder, num_generations=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer),
        dense=DenseConfig(gap_every=0),
    )  # fmt: skip
    ids = torch.randint(4, 60, (2, 9))
    out = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:]}
    out |= {f"{part}_mask": torch.ones_like(out[f"{part}_ids"]) for part in ("prompt", "completion")}
    [(whole_BT, _)] = trainer._forward("policy", out)
    # accelerate shards on accelerators only; the rest of a run is as it would be there.
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    sharded = FullyShardedDataParallel(
        copy.deepcopy(model), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    trainer.model = trainer.model_wrapped = sharded
    trainer.is_fsdp_enabled = True
    reads = []
    for _ in range(2):  # before any forward of the wrapped model, and after one
        reads.append(trainer._forward("policy", out)[0][0])
        with torch.no_grad():
            sharded(input_ids=ids)
    torch.save({"whole": whole_BT, "shards": torch.stack(reads)}, f"{folder}/{trainer.accelerator.process_index}")
