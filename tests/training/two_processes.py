"""One generation on each of two processes, kept for `test_training_processes` to look at."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from mechreward.reward import FeatureReward
from mechreward.sae import SAE, SAEMeta
from mechreward.training import DenseConfig, JsonlMetrics, MechRewardGRPOTrainer, RolloutRecorder


def even_tokens(completion_ids, **_) -> list[float]:
    return [sum(1.0 for token in ids if token % 2 == 0) / len(ids) for ids in completion_ids]


class Spy(MechRewardGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        seen = {key: out[key] for key in keys}
        seen["stock"] = torch.tensor(list(self._logs["advantages"]))
        torch.save(seen, f"{self.args.output_dir}/rank{self.accelerator.process_index}.pt")
        self.seen = seen
        return out


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    words = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz ", *map(str, range(34))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, *range(44, 64)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    encoder = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    meta = SAEMeta(release="r", sae_id="i", layer=1, model_name="", hook_name="h")
    sae = SAE("topk", encoder, torch.zeros(64), encoder.T.clone(), torch.zeros(32), meta, k=32)
    recorder = RolloutRecorder(f"{folder}/rollouts.parquet", "dense", 0)
    trainer = Spy(
        model=model,
        reward_funcs=[FeatureReward({3: 1.0, 7: -0.5, 11: 2.0}, sae), even_tokens],
        args=GRPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=6,
            num_generations=4,
            max_completion_length=9,
            num_iterations=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "hello you", "x", "q r"]}),
        callbacks=[JsonlMetrics(f"{folder}/metrics.jsonl", "dense", 0), recorder],
        on_rollouts=recorder,
        processing_class=wrapped,
        dense=DenseConfig(weight=0.4, gap_every=1, sample_rollouts=12),
    )
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save({"weights": weights}, f"{folder}/trained{trainer.accelerator.process_index}.pt")
