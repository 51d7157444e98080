"""No tests: the source archive does not contain those of generation."""


class GenerationTesterMixin:
    pass
