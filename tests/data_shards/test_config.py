import pytest
from pydantic import ValidationError

from data_shards.config import StreamConfig


@pytest.mark.parametrize(
    "fields", [{"lanes": 0}, {"window": -1}, {"damage_fraction": 1.5}, {"shift_pixels": -1}]
)
def test_numbers_outside_their_limits_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        StreamConfig(**fields)


def test_unknown_option_is_refused():
    with pytest.raises(ValidationError, match="lane"):
        StreamConfig(**{"lane": 3})
