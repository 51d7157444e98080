"""No values: the source archive leaves out the arguments that every configuration takes."""

config_common_kwargs = {}
