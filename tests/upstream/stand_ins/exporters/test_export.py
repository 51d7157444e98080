"""No tests: the source archive leaves out those of exports."""


class ExportTesterMixin:
    pass


class ExportGenerateTesterMixin:
    pass
