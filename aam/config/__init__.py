"""Every option of every command: one typed field with a docstring is the option.

The command line, the TOML file (``--config run.toml``), the saved ``config.toml``, the keywords of
`aam.pretrain` and the documentation are all made from these classes. Option names are the field
names, with dashes on the command line.
"""

from aam.config.commands import (
    CONFIGS,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    InspectConfig,
    PredictConfig,
    PretrainConfig,
    UnifracConfig,
    from_options,
)  # fmt: skip
from aam.config.groups import (
    DistanceOptions,
    FinetunePenaltyOptions,
    MetadataOptions,
    NucleotideOptions,
    OptimizerOptions,
    OptionalTableOptions,
    PenaltyOptions,
    RunOptions,
    TableOptions,
    TargetOptions,
    TruthOptions,
)  # fmt: skip
from aam.config.options import (
    check,
    flag,
    from_dict,
    nearest,
    options_of,
    read_toml,
    to_dict,
    write_toml,
)  # fmt: skip

__all__ = [
    "CONFIGS", "DemoConfig", "DistanceOptions", "EmbedConfig", "EvaluateConfig", "FinetuneConfig",
    "FinetunePenaltyOptions", "InspectConfig", "MetadataOptions", "NucleotideOptions",
    "OptimizerOptions", "OptionalTableOptions", "PenaltyOptions", "PredictConfig",
    "PretrainConfig", "RunOptions", "TableOptions", "TargetOptions", "TruthOptions",
    "UnifracConfig", "check", "flag", "from_dict", "from_options", "nearest", "options_of",
    "read_toml", "to_dict", "write_toml",
]  # fmt: skip
