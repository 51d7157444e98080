"""How many tokens to draft: as many as make the next round worth most, by what was measured so far.

With acceptance a, a round with g drafted tokens yields E(g) = (1 - a^(g+1)) / (1 - a) tokens a row (Leviathan et al. 2023,
equation 1) and takes g draft passes and one target pass over g + 1 tokens. The g with the most tokens a second is taken;
0 is plain decoding.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence


_PRIOR_ACCEPTANCE = 0.7
_PRIOR_WEIGHT = 2.0  # drafted tokens that the prior counts for
_MEMORY = 0.95  # of what was counted, kept from round to round
_SAMPLES = 7  # latest times of a kind whose median counts
_FIRST_CHECK, _LAST_CHECK = 12, 96  # rounds with a draft until a plain one is timed again; doubled each time
_FIRST_PAUSE = 8  # plain rounds until drafting is tried again; doubled each time that it did not pay
_MARGIN = 1.03  # by which drafting must be better than plain decoding


class DraftLength:
    """The number of tokens to draft in a round: here the same in every round.

    Args:
        num_tokens (`int`): to draft; 0 is plain decoding.
    """

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens

    def choose(self) -> int:
        """Of the next round."""
        return self._num_tokens

    def observe(self, width: int, limits: Sequence[int], accepted: Sequence[int], draft: float, target: float) -> None:
        """Takes what a round with `width` drafted columns brought.

        Args:
            width (`int`): drafted columns.
            limits (`Sequence[int]`): of each row, how many of them it could have taken before its end.
            accepted (`Sequence[int]`): of each row, how many it took.
            draft (`float`): seconds.
            target (`float`): seconds.
        """

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows of these indices."""

    def join(self, num_rows: int) -> None:
        """Takes in so many rows that nothing is known of."""


class AdaptiveDraftLength(DraftLength):
    """The number that promises the most tokens a second, and plain decoding where drafting does not pay.

    Args:
        num_rows (`int`): of the batch; acceptance is estimated by row.
        longest (`int`): most tokens to draft.
    """

    def __init__(self, num_rows: int, longest: int):
        self._longest = longest
        self._tried = [0.0] * num_rows
        self._accepted = [0.0] * num_rows
        self._draft_seconds: deque[float] = deque(maxlen=_SAMPLES)  # of one drafted token
        self._target_seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))  # by tokens
        self._pause, self._waited = _FIRST_PAUSE, 0
        self._check, self._drafting = _FIRST_CHECK, 0

    def choose(self) -> int:
        """Of the next round: a plain one first, for its time, then a short draft, then the best by all times known."""
        if not self._target_seconds[1]:
            return 0
        if not self._draft_seconds:
            return min(3, self._longest)
        if 0 < self._waited < self._pause:
            self._waited += 1
            return 0
        speeds = self._tokens_per_second()
        best = max(range(1, self._longest + 1), key=speeds.__getitem__)
        if speeds[best] > _MARGIN * speeds[0]:
            self._pause, self._waited = _FIRST_PAUSE, 0
            self._drafting += 1
            if self._drafting <= self._check:
                return best
            # The plain pass may have been timed at a bad moment, and takes longer with each token in the cache.
            self._check, self._drafting = min(2 * self._check, _LAST_CHECK), 0
            return 0
        if self._waited < self._pause:
            self._waited += 1
            return 0
        self._pause, self._waited = 2 * self._pause, 0
        return 1  # acceptance may have changed with the text

    def observe(self, width: int, limits: Sequence[int], accepted: Sequence[int], draft: float, target: float) -> None:
        self._target_seconds[width + 1].append(target)
        if not width:
            return
        self._draft_seconds.append(draft / width)
        for row, (taken, limit) in enumerate(zip(accepted, limits, strict=True)):
            # Tokens after the first rejected one were not judged; one that could not be proposed is as good as rejected.
            self._tried[row] = _MEMORY * self._tried[row] + min(taken + 1, width, limit)
            self._accepted[row] = _MEMORY * self._accepted[row] + taken

    def keep(self, kept: Sequence[int]) -> None:
        self._tried = [self._tried[row] for row in kept]
        self._accepted = [self._accepted[row] for row in kept]

    def join(self, num_rows: int) -> None:
        """Takes in so many rows, which count as the batch does until they have been observed."""
        self._tried += [0.0] * num_rows
        self._accepted += [0.0] * num_rows

    def _tokens_per_second(self) -> list[float]:
        """Of a round with each number of drafted tokens, from none on."""
        acceptances, draft = self._acceptances(), statistics.median(self._draft_seconds)
        known = {count: statistics.median(times) for count, times in self._target_seconds.items() if times}
        return [
            sum(expected_tokens(acceptance, width) for acceptance in acceptances)
            / (width * draft + _target_time(known, width + 1))
            for width in range(self._longest + 1)
        ]

    def _acceptances(self) -> list[float]:
        """By row, drawn towards the batch's, and that towards the prior."""
        whole = (sum(self._accepted) + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (sum(self._tried) + _PRIOR_WEIGHT)
        pairs = zip(self._accepted, self._tried, strict=True)
        return [(accepted + 4 * whole) / (tried + 4) for accepted, tried in pairs]


def _target_time(known: dict[int, float], tokens: int) -> float:
    """Seconds of a target pass over so many tokens a row: measured, or on the line through the nearest measured ones."""
    if tokens in known:
        return known[tokens]
    if len(known) == 1:
        return next(iter(known.values()))
    near, other = sorted(known, key=lambda count: abs(count - tokens))[:2]
    slope = max(0.0, (known[near] - known[other]) / (near - other))
    return known[near] + slope * (tokens - near)


def expected_tokens(acceptance: float, width: int) -> float:
    """Tokens that a row gains in a round with `width` drafted ones, each accepted with this probability."""
    if acceptance >= 1:
        return width + 1.0
    return (1 - acceptance ** (width + 1)) / (1 - acceptance)
