"""The public names of the package, by the module that holds them."""

# Names that programs of others hold on to: one that goes or is renamed breaks them.
PUBLIC = {
    "radix_ops": [
        "FoldedBatch", "activate_flash_attention", "attention", "current_flash_attention", "fold", "ops", "pack",
    ],
    "radix_ops.cli": ["main"],
    "radix_ops.compat": ["compute_fold_and_scatter", "compute_fold_and_scatter_torch"],
    "radix_ops.compat.torch": ["compute_fold_and_scatter_torch"],
    "radix_ops.engine": [
        "Classifier", "Embedder", "LabelPrompt", "OutOfMemory", "Reranker", "Scorer", "Template", "UserError",
        "metrics",
    ],
    "radix_ops.hf": ["RadixStats", "disable", "enable", "folded"],
    "radix_ops.lm_eval": ["RadixLM"],
    "radix_ops.losses": [
        "Targets", "causal_lm_loss", "plan_targets", "sequence_logprobs", "token_entropy", "token_logprobs",
        "token_logprobs_and_entropy",
    ],
    "radix_ops.models.qwen3": ["Qwen3Config", "Qwen3ForCausalLM", "Qwen3Model"],
    "radix_ops.plan": [
        "ForwardCost", "Plan", "Shard", "Shards", "TokenStore", "attention_flops", "plan_folded", "plan_padded",
        "weight_flops",
    ],
    "radix_ops.reference": ["fold", "gather", "scatter_add", "varlen_attention"],
    "radix_ops.serve": ["BatchLimits", "QueueLimits", "Settings", "create_app"],
    "radix_ops.trainers": ["GroupSampler", "enable", "keep_groups_together", "loss_on_rows"],
}  # fmt: skip
