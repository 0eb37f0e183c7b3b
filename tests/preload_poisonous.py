"""What a fork server preloads so that `Poisonous` stands for every engine in its forks."""

from tests.poisonous import Poisonous
from workers import runner

runner.engine_class = lambda kind: Poisonous  # type: ignore[assignment]
