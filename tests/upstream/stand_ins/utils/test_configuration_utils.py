"""No values: the source archive does not contain the arguments of every configuration."""

config_common_kwargs = {}
