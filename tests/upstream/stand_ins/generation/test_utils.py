"""No tests: the source archive leaves out those of generation."""


class GenerationTesterMixin:
    pass
