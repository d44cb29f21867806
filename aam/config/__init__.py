"""Every option of every command: one typed field with a docstring is the option.

The command line, the TOML file (``--config run.toml``), the saved ``config.toml``, the keywords of
`aam.pretrain` and the documentation are all made from these classes. Option names are the field
names, with dashes on the command line.
"""

from aam.config.commands import *  # noqa: F403
from aam.config.groups import *  # noqa: F403
from aam.config.options import *  # noqa: F403
