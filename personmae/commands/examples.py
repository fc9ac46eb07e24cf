"""The end of each verb's help: an example, and for programs their main keys."""

EXAMPLES = {
    "synth": "personmae synth runs/people --pool-images 2000",
    "shards write": "personmae shards write CROPS/ s3://bucket/crops",
    "shards verify": "personmae shards verify s3://bucket/crops",
    "shards stats": "personmae shards stats runs/quickstart/shards",
    "pretrain": "personmae pretrain configs/pretrain_vit_small.yaml data.shards=SHARDS run_dir=runs/vit_small",
    "finetune": "personmae finetune configs/finetune_market1501.yaml root=DATA/Market-1501-v15.09.15 init=runs/vit_small",
    "unsupervised": "personmae unsupervised configs/usl_market1501.yaml root=DATA/Market-1501-v15.09.15 init=runs/vit_small",
    "evaluate": "personmae evaluate runs/finetune_market1501 market1501 DATA/Market-1501-v15.09.15",
    "import": "personmae import mae_pretrain_vit_base.pth runs/mae_base",
    "export": "personmae export runs/finetune_market1501 exported",
    "extract": "personmae extract CROPS/ features.parquet --model exported",
    "gallery build": "personmae gallery build CROPS/ gallery --model runs/finetune_market1501",
    "gallery query": "personmae gallery query gallery person.jpg --picture found.png",
    "gallery add": "personmae gallery add gallery MORE_CROPS/",
    "gallery remove": "personmae gallery remove gallery 0001_c2s1_000451_03.jpg",
    "serve": "personmae serve gallery --pretrained runs/vit_small",
    "report": "personmae report runs/quickstart",
    "visualise": "personmae visualise runs/quickstart/finetune_personmae",
    "bench data": "personmae bench data runs/quickstart/shards",
    "bench step": "personmae bench step --sizes micro,small --batches 32,64",
    "bench counts": "personmae bench counts --batch 256 --measure",
    "bench checkpoint": "personmae bench checkpoint --size small",
    "bench retrieval": "personmae bench retrieval market",
    "bench cluster": "personmae bench cluster --preset market",
    "doctor": "personmae doctor --shards s3://bucket/crops",
    "keys": "personmae keys pretrain batch",
    "completion": 'eval "$(personmae completion bash)"',
    "help": "personmae help shards write",
    "render": "personmae render configs/pretrain_vit_base.yaml data.shards=s3://b/crops checkpoint.upload_to=s3://b/runs/base",
    "submit": "personmae submit configs/pretrain_vit_base.yaml data.shards=s3://b/crops checkpoint.upload_to=s3://b/runs/base "
    "--nodes 2:8 --image NAME@sha256:DIGEST",
    "status": "personmae status RUN --watch",
    "logs": "personmae logs RUN -f --index 0",
    "scale": "personmae scale RUN --nodes 4",
    "suspend": "personmae suspend RUN",
    "resume": "personmae resume RUN",
    "adopt": "personmae adopt RUN",
    "delete": "personmae delete RUN",
    "launcher/pretrain.py": "deepspeed launcher/pretrain.py --config configs/pretrain_vit_small.yaml data.shards=SHARDS",
    "launcher/finetune.py": "deepspeed launcher/finetune.py --config configs/finetune_market1501.yaml init=runs/vit_small",
    "launcher/unsupervised.py": "deepspeed launcher/unsupervised.py --config configs/usl_market1501.yaml init=runs/vit_small",
}
_SHARED = ("run_dir", "model.size", "model.img_size", "seed", "checkpoint.every_steps", "checkpoint.upload_to")
MAIN_KEYS = {
    "pretrain": (
        *("data.shards", *_SHARED, "train.global_batch_size", "train.max_micro_batch_size", "train.epochs"),
        *("train.precision", "optim.base_lr", "mask.ratio", "engine.name", "data.cache_dir"),
    ),
    "finetune": (
        *("benchmark", "root", "init", *_SHARED, "head.kind", "batch.num_ids", "batch.num_instances", "train.epochs"),
        *("train.precision", "optim.lr"),
    ),
    "unsupervised": (
        *("benchmark", "root", "init", *_SHARED, "cluster.eps", "batch.num_ids", "batch.num_instances", "train.epochs"),
        *("train.iters_per_epoch", "train.precision", "optim.lr"),
    ),
}


def closing(prog: str) -> str | None:
    """The end of the help of ``prog``, or None."""
    verb = prog.removeprefix("personmae ")
    example = f"example:\n  {EXAMPLES[verb]}\n" if verb in EXAMPLES else None
    program = verb.removeprefix("launcher/").removesuffix(".py")
    if program not in MAIN_KEYS or example is None:
        return example
    return f"{_main_keys(program)}\n{example}"


def _main_keys(program: str) -> str:
    from personmae import config
    from personmae.keys.table import keys_of, to_table

    chosen = MAIN_KEYS[program]
    keys = sorted((key for key in keys_of(config.PROGRAMS[program]) if key.name in chosen), key=lambda k: chosen.index(k.name))
    return f"main keys, their types and defaults (all: personmae keys {program}):\n{to_table(keys)}"
