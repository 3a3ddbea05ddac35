import pytest

from wsss.methods.schedules import cosine_warmup, poly_warmup


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 6e-11),
        (199, 7.960052e-6),
        (1499, 5.996e-5),
        (1500, 5.593438e-5),
        (1999, 5.457468e-5),
        (19999, 8.07652e-9),
    ],
)
def test_voc_rates(step: int, rate: float) -> None:
    multiplier = poly_warmup(step, max_steps=20_000, warmup_steps=1500)
    assert 6e-5 * multiplier == pytest.approx(rate, rel=1e-6)


def test_coco_rate_after_warmup() -> None:
    multiplier = poly_warmup(1500, max_steps=80_000, warmup_steps=1500)
    assert 6e-5 * multiplier == pytest.approx(5.898654e-5, rel=1e-6)


def test_last_value_is_kept_past_the_end() -> None:
    values = [poly_warmup(s, max_steps=100, warmup_steps=10) for s in (99, 100, 5000)]
    assert values[0] > 0
    assert values == [values[0]] * 3


def test_without_warmup_and_with_warmup_longer_than_the_run() -> None:
    assert poly_warmup(0, max_steps=10, warmup_steps=0) == 1
    assert poly_warmup(50, max_steps=10, warmup_steps=20) == pytest.approx(0.45, rel=1e-5)


def test_cosine_counts_from_the_start_not_the_warmup() -> None:
    def rate(time: float) -> float:
        return cosine_warmup(time, length=10, warmup=2, start=0.1, floor=0.2)

    assert rate(0) == 0.1
    assert rate(1) == pytest.approx(0.55)
    assert rate(2) == pytest.approx(0.2 + 0.4 * (1 + 0.809016994))
    assert rate(5) == pytest.approx(0.6)
    assert rate(10) == pytest.approx(0.2)


def test_cosine_rises_to_a_floor_above_one() -> None:
    rates = [cosine_warmup(t, length=80, warmup=5, start=0.1, floor=1.2) for t in range(80)]
    assert rates == sorted(rates)
    assert cosine_warmup(0, length=4, warmup=0, start=0.1, floor=0.5) == 1
