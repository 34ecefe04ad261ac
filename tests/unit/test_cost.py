"""What a collection costs, by hand and from the command line."""

import json
from dataclasses import replace

import pytest

from cluster.cost import RATES, Assumptions, cost_of, main

ROUND = {
    "decode_images_per_core_s": 100,
    "render_images_per_core_s": 10,
    "results_bytes_per_image": {"7x7": 400, "14x14": 1000},
    "png_bytes": 100_000,
}
GIVEN = Assumptions(
    gpus=2,
    gpu_images_per_s=1000,
    gpu_price=1,
    gpu_node_cpus=4,
    cpu_price=0.1,
    image_bytes=1e5,
    pictures=0.1,
    overhead=1,
)


def test_by_hand() -> None:
    cost = cost_of(3.6e6, GIVEN, ROUND)
    assert cost.gpu_hours == pytest.approx(1)
    assert cost.wall_hours == pytest.approx(0.5)
    # 10 ms of decoding and, for one in ten, 100 ms of rendering; six CPUs come with the GPUs, 40 are needed.
    assert cost.decode_core_hours == pytest.approx(20)
    assert cost.extra_cpus == pytest.approx(34)
    assert cost.read_bytes == pytest.approx(3.6e11)
    assert cost.results_bytes == pytest.approx(1.44e9)
    assert cost.png_bytes == pytest.approx(3.6e10)
    assert cost.gpu_dollars == pytest.approx(1)
    assert cost.cpu_dollars == pytest.approx(1.7)
    assert cost.request_dollars == pytest.approx(1.44)
    assert cost.dollars == pytest.approx(4.14)
    assert cost.storage_dollars == pytest.approx(0.03744 * 23)


def test_more_gpus_take_less_time_and_cost_the_same() -> None:
    one, many = (cost_of(1e9, replace(GIVEN, gpus=gpus, pictures=0), ROUND) for gpus in (1, 16))
    assert many.wall_hours == pytest.approx(one.wall_hours / 16)
    assert many.dollars == pytest.approx(one.dollars)


def test_an_assumed_gpu_is_a_share_of_its_peak() -> None:
    given = replace(GIVEN, gpu_images_per_s=None, gpu_tflops=100, gpu_share=0.5, backbone="vgg16")
    assert given.gpu_rate == pytest.approx(50e12 / (2 * 15.47e9 * 1.76))
    assert cost_of(1000, given, ROUND).results_bytes == 1e6


def test_the_command_says_what_is_measured_and_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    measured = json.loads(RATES.read_text())["measured"]
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "1,000,000" in text
    assert "1,000,000,000" in text
    assert "ASSUMED: 30% of 70 TFLOP/s" in text
    assert measured["machine"] in text
    # The documents show what the command prints.
    shown = (RATES.parents[1] / "docs" / "scaling-out.md").read_text().splitlines()
    assert [line for line in text.splitlines() if line and f"    {line}" not in shown] == []
    assert main(["--images", "5e6", "--gpu-images-per-s", "1000", "--backbone", "vgg19"]) == 0
    text = capsys.readouterr().out
    assert "5,000,000" in text
    assert "ASSUMED" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--images 0", "above zero"),
        ("--images 1e6 -5", "below zero"),
        ("--images nan", "below zero or without end"),
        ("--gpus 0", "0 is below 1"),
        ("--gpus 1.5", "1.5"),
        ("--gpu-share 0", "above zero"),
        ("--pictures -0.1", "below zero"),
    ],
)
def test_impossible_numbers_are_refused(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_prices_need_not_be_whole_and_may_be_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "1e6", "--storage-price", "20.5", "--gpu-price", "0"]) == 0
    assert "$ GPU nodes                               0.00\n" in capsys.readouterr().out
