"""The number of tokens to draft per round, chosen to maximize throughput as measured so far.

With acceptance a, a round with g drafted tokens yields E(g) = (1 - a^(g+1)) / (1 - a) tokens per row (Leviathan et
al. 2023, equation 1) and takes g draft passes and one target pass over g + 1 tokens. The g with the most tokens per
second is chosen; 0 is plain decoding.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence


_PRIOR_ACCEPTANCE = 0.7
_PRIOR_WEIGHT = 2.0  # weight of the prior, in drafted tokens
_MEMORY = 0.95  # decay of the counts per round
_SAMPLES = 7  # the median of this many latest times is used
_FIRST_CHECK, _LAST_CHECK = 12, 96  # drafting rounds before a plain round is timed again; doubled each time
_FIRST_PAUSE = 8  # plain rounds before drafting is tried again; doubled each time that drafting was slower
_MARGIN = 1.03  # speedup over plain decoding that drafting must promise


class DraftLength:
    """The number of drafted tokens with the highest expected throughput; 0 where plain decoding is faster.

    Args:
        num_rows (`int`): batch size; acceptance is estimated per row.
        lengths (`Sequence[int]`): the numbers of tokens to choose from, in ascending order.
        fixed (`int`, *optional*): always draft this number; 0 is plain decoding.
    """

    def __init__(self, num_rows: int, lengths: Sequence[int], fixed: int | None = None):
        self._lengths, self._fixed = lengths, fixed
        self._tried = [0.0] * num_rows
        self._accepted = [0.0] * num_rows
        self._draft_seconds: deque[float] = deque(maxlen=_SAMPLES)  # per drafted token
        # Of a target pass, by the number of tokens per row.
        self._target_seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._pause, self._waited = _FIRST_PAUSE, 0
        self._check, self._drafting = _FIRST_CHECK, 0

    def choose(self) -> int:
        """Returns 0 first, to time a plain round, then a short draft, then the best number by all known times."""
        if self._fixed is not None:
            return self._fixed
        if not self._target_seconds[1]:
            return 0
        if not self._draft_seconds:
            return min(3, self._lengths[-1])
        if 0 < self._waited < self._pause:
            self._waited += 1
            return 0
        speeds = self._tokens_per_second()
        best = max(self._lengths, key=speeds.__getitem__)
        if speeds[best] > _MARGIN * speeds[0]:
            self._pause, self._waited = _FIRST_PAUSE, 0
            self._drafting += 1
            if self._drafting <= self._check:
                return best
            # The plain pass may have been timed at a bad moment, and slows down as the cache grows. Time it again.
            self._check, self._drafting = min(2 * self._check, _LAST_CHECK), 0
            return 0
        if self._waited < self._pause:
            self._waited += 1
            return 0
        self._pause, self._waited = 2 * self._pause, 0
        return 1  # acceptance may have changed with the text

    def observe(self, width: int, limits: Sequence[int], accepted: Sequence[int], draft: float, target: float) -> None:
        """Records the outcome of a round.

        Args:
            width (`int`): number of drafted columns.
            limits (`Sequence[int]`): maximum number of drafted tokens per row, given the room before its end.
            accepted (`Sequence[int]`): number of accepted tokens per row.
            draft (`float`): seconds of drafting.
            target (`float`): seconds of the target pass.
        """
        self._target_seconds[width + 1].append(target)
        if not width:
            return
        self._draft_seconds.append(draft / width)
        for row, (taken, limit) in enumerate(zip(accepted, limits, strict=True)):
            # Tokens after the first rejected one were not verified. One that could not be proposed counts as rejected.
            self._tried[row] = _MEMORY * self._tried[row] + min(taken + 1, width, limit)
            self._accepted[row] = _MEMORY * self._accepted[row] + taken

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows with these indices."""
        self._tried = [self._tried[row] for row in kept]
        self._accepted = [self._accepted[row] for row in kept]

    def join(self, num_rows: int) -> None:
        """Adds rows, which have the acceptance of the batch until their own is observed."""
        self._tried += [0.0] * num_rows
        self._accepted += [0.0] * num_rows

    def _tokens_per_second(self) -> dict[int, float]:
        """Expected throughput of a round by number of drafted tokens, 0 included."""
        # Per row, shrunk towards the acceptance of the batch, which is shrunk towards the prior.
        whole = (sum(self._accepted) + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (sum(self._tried) + _PRIOR_WEIGHT)
        pairs = zip(self._accepted, self._tried, strict=True)
        acceptances = [(accepted + 4 * whole) / (tried + 4) for accepted, tried in pairs]
        draft = statistics.median(self._draft_seconds)
        known = {count: statistics.median(times) for count, times in self._target_seconds.items() if times}
        return {
            width: sum(expected_tokens(acceptance, width) for acceptance in acceptances)
            / (width * draft + _target_time(known, width + 1))
            for width in (0, *self._lengths)
        }


def _target_time(known: dict[int, float], tokens: int) -> float:
    """Seconds of a target pass over `tokens` tokens per row, measured or by linear extrapolation."""
    if tokens in known:
        return known[tokens]
    if len(known) == 1:
        return next(iter(known.values()))
    near, other = sorted(known, key=lambda count: abs(count - tokens))[:2]
    slope = max(0.0, (known[near] - known[other]) / (near - other))
    return known[near] + slope * (tokens - near)


def expected_tokens(acceptance: float, width: int) -> float:
    """Expected number of new tokens of a row in a round with `width` drafted ones."""
    if acceptance >= 1:
        return width + 1.0
    return (1 - acceptance ** (width + 1)) / (1 - acceptance)
