"""Settings of earlier versions and what to use instead; there are no silent aliases."""

_CLIP = "use objective.clip LOW,HIGH, which every method with a ratio shares"
_TEMPERATURE = "use objective.temperature, which kvpo and latent-distance share"
_ENCODERS = "use backbone.encoders, the folder of a Wan 2.1 model with text encoder, tokenizer and VAE"
_BANK = "use stream.bank memflow, or memflow,every-block,sparse as wanted"
_KEEP = "use objective.keep BEST,WORST"
_SUSPICION = "rewards.fusion selective withholds from a rank gap of 0.25 on, reversing turns round from 0 on"
_ADAPTER = "every linear layer of a block gets an adapter, and its alpha is its rank"
_ADAMW = "AdamW runs as published: betas 0.9,0.999, weight decay 0.01, gradients clipped to norm 1"

_GEOMETRY = "use backbone.geometry, a name or a JSON file in the form of diffusers' transformer/config.json"

OLD = {
    "base": "use backbone.checkpoint",
    "backbone.checkpoint_entry": "use backbone.checkpoint FILE#ENTRY",
    "backbone.lora_entry": "use backbone.lora FILE#ENTRY",
    "backbone.tokenizer": _ENCODERS,
    "backbone.text_encoder": _ENCODERS,
    "backbone.vae": _ENCODERS,
    "prompts.switches": "use prompts.frames, which ends with the video's length: 39,75,147 for three prompts",
    "stream.context_noise": "the clean pass takes the block as it is, as in the public pipelines",
    "stream.bank_size": _BANK,
    "stream.sparse_activation": _BANK,
    "stream.bank_every_block": _BANK,
    "backbone.embeddings": "set the environment variable KVPO_CACHE; they are kept in embeddings/ there",
    "backbone.offline": "set the environment variable HF_HUB_OFFLINE=1",
    **{
        f"model.{name}": _GEOMETRY
        for name in (
            "dim",
            "num_heads",
            "num_layers",
            "ffn_dim",
            "freq_dim",
            "text_len",
            "text_dim",
            "channels",
            "patch_size",
            "eps",
        )
    },
    "model.latent_height": "use stream.size ROWS,COLUMNS",
    "model.latent_width": "use stream.size ROWS,COLUMNS",
    "model.relative_positions": "use backbone.geometry 1.3b-relative, or relative_positions in a file",
    "objective.anchor_state_weight": "use kvpo.anchor_state_weight",
    "objective.anchor_share": "use kvpo.anchor_share",
    "objective.anchor_in_pool": "use kvpo.anchor_share, which above 0 puts the anchor in the pool",
    "objective.simplex_kl": "use kvpo.simplex_kl",
    "objective.clip_low": _CLIP,
    "objective.clip_high": _CLIP,
    "kvpo.clip_low": _CLIP,
    "kvpo.clip_high": _CLIP,
    "latent_distance.clip_low": _CLIP,
    "latent_distance.clip_high": _CLIP,
    "flow_grpo.clip": _CLIP,
    "cm_grpo.clip": _CLIP,
    "kvpo.temperature": _TEMPERATURE,
    "latent_distance.temperature": _TEMPERATURE,
    "objective.keep_best": _KEEP,
    "objective.keep_worst": _KEEP,
    "objective.advantage_scale": "use objective.scale group or collection",
    "objective.advantage_clamp": "advantages end at plus or minus 2.5",
    "objective.global_weight": "the global signal has half the weight of the local one; "
    "exploration.tail_blocks 0 scores little of it",
    "objective.noise_floor": "use rewards.noise_floors total=FLOOR",
    "nft.advantage_limit": "a branch counts as wholly good at an advantage of 2.5, where advantages end",
    "exploration.redraw_every_block": "routes are drawn once per window",
    "exploration.reencode_pool": "a prompt switch re-encodes the deployment window, as LongLive does",
    "optim.train": "use optim.lora_rank, where 0 trains all parameters",
    "optim.lora_alpha": _ADAPTER,
    "optim.lora_targets": _ADAPTER,
    "optim.betas": _ADAMW,
    "optim.weight_decay": _ADAMW,
    "optim.grad_clip": _ADAMW,
    "optim.warmup_updates": "the learning rate reaches optim.lr in the fifth update; change optim.lr",
    "backbone.lora_alpha": "an adapter's alpha is what its files state, else its rank; add an entry "
    "lora_alpha to a .pt file, or put adapter_config.json beside a PEFT file",
    "rewards.segment_discount": "every frame of the global signal counts alike",
    "rewards.primary": "the first component is checked against the others: name its reward first in "
    "rewards.scorers",
    "rewards.rank_margin": _SUSPICION,
    "rewards.rank_penalty": _SUSPICION,
    "rewards.noise_files": "use rewards.noise_floors COMPONENT=FILE, as `kvpo calibrate` prints it",
    "evaluation.held_out": "use evaluation.watchers",
    "evaluation.weights": "runs are judged by the moving average (optim.ema_decay 0: by the last update); "
    "generate, evaluate and export take --weights raw",
    "evaluation.diversity_prompts": "branch diversity is measured on up to 16 of the long validation prompts",
    "evaluation.hacking_errors": "an alarm takes 3 paired standard errors",
    "evaluation.hacking_patience": "a run stops at the second alarm in a row",
    "checkpoint.keep": "the last two checkpoints and the best one are kept",
}
"""Dotted path -> what to use instead, or what now holds in every run."""
OLD_SECTIONS = {path.partition(".")[0] for path in OLD if "." in path}
