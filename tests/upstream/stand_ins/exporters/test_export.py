"""No tests: the source archive does not contain those of exports."""


class ExportTesterMixin:
    pass


class ExportGenerateTesterMixin:
    pass
