"""Short help of the training commands, printed without importing what they need."""

ALL = "--help-all"

_COMMON = f"""
configuration:
  -c, --config NAME     a YAML file, or one that ships with mainstem; several are merged from left to right
  --model.KEY=VALUE     such as --model.backbone.mixer=gla, --model.optimizer.lr=0.001
  --data.KEY=VALUE      such as --data.path=my.csv, --data.batch_size=64
  --trainer.KEY=VALUE   such as --trainer.max_epochs=20, --trainer.devices=2, --trainer.precision=bf16-mixed
  --model.help CLASS    the options of a model; --data.help and --trainer.callbacks.help likewise
  {ALL}            every option
"""

_FIT = """usage: mainstem fit -c CONFIG [-c CONFIG ...] [--KEY=VALUE ...]
       mainstem fit --run DIR [--KEY=VALUE ...]

Train a model in a new folder runs/DOMAIN/NUMBER, or go on with an interrupted run.

  --run DIR             go on with this run from its last checkpoint
  --output DIR          folder of a new run, instead of the next number
  --seed_everything N   seed (0)
  --print_config        print the merged configuration and stop
"""

_EVALUATE = """usage: mainstem {command} --run DIR [--KEY=VALUE ...]
       mainstem {command} -c CONFIG --ckpt_path FILE [--KEY=VALUE ...]

{what}

  --run DIR             use this run's configuration and best checkpoint
  --ckpt_path FILE      another checkpoint; with --run also `best` or `last`
"""

_PREDICT = """  --output DIR          where to write (DIR/predictions)
"""

_EVALUATED = {
    "validate": "Print the metrics on the validation part.",
    "test": "Print the metrics on the test part beside the baselines', and write metrics.json into the run.",
    "predict": "Write predictions as files; --data.path=my.csv predicts for data of your own.",
}


def text(command: str) -> str:
    """Help of ``fit``, ``validate``, ``test`` or ``predict``."""
    if command == "fit":
        return _FIT + _COMMON
    own = _PREDICT if command == "predict" else ""
    return _EVALUATE.format(command=command, what=_EVALUATED[command]) + own + _COMMON
