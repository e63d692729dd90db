"""How the CUDA prototype_contrastive_loss cuts a problem: its index maps, by an ordinary C++ compiler, gone through one by one."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
TILE, KIB = 64, 1 << 10


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "plan.so"
    source = ROOT / "tests" / "cuda_emulator" / "contrast_plan.cpp"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run([COMPILER, *flags, source, "-o", out], check=True)
    return ctypes.CDLL(str(out))


def numbers(function, count, *arguments):
    out = (ctypes.c_int64 * count)()
    function(*(ctypes.c_int64(a) for a in arguments), out)
    return list(out)


def test_the_columns_of_the_products_are_all_pixels_once(plan):
    for place in (plan.plan_forward_pixel, plan.plan_backward_pixel):
        assert sorted(place(product, column) for product in range(8) for column in range(8)) == list(range(TILE))


def test_a_lanes_pixels_lie_side_by_side(plan):
    for column in range(8):
        assert [plan.plan_forward_pixel(product, column) for product in range(8)] == list(
            range(column * 8, column * 8 + 8)
        )
    for q in range(4):
        pixels = [plan.plan_backward_pixel(product, 2 * q + odd) for product in range(8) for odd in range(2)]
        assert pixels == list(range(16 * q, 16 * q + 16))


def test_every_weight_is_where_the_tensor_core_reads_it(plan):
    """Second factor of m16n8k16: lane (g, q) holds, of column g, rows 2q, 2q+1 in word 0 and 2q+8, 2q+9 in word 1; two products a read."""
    places = {}
    for step in range(15):
        for pair in range(4):
            for lane in range(32):
                for word in range(4):
                    for half in range(2):
                        g, q = lane // 4, lane % 4
                        cls = step * 16 + 2 * q + 8 * (word % 2) + half
                        pixel = plan.plan_backward_pixel(2 * pair + word // 2, g)
                        places[cls, pixel] = (((step * 4 + pair) * 32 + lane) * 4 + word) * 2 + half
    assert len(places) == 240 * TILE == len(set(places.values()))
    assert all(plan.plan_weight_place(*where) == place for where, place in places.items())


@pytest.mark.parametrize("shifted", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 63, 64])
def test_words_of_a_row_hold_its_pixels_and_nothing_beyond(plan, count, shifted):
    read = set()
    for word in range(TILE // 2 + shifted):
        begin = plan.plan_word_begin(word, shifted)
        given = plan.plan_word_given(begin, count)
        read |= set(range(begin, begin + given // 2))
        assert (not given or begin + given // 2 <= count) and begin == 2 * word - shifted
    assert read - {-1} == set(range(count))  # -1: the half float that shares the first word


@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 200, 2**31 - 1])
def test_tiles_are_all_pixels_of_all_images_once(plan, pixels):
    each = -(-pixels // TILE)
    for image in (0, 1, 40_000):  # 64 bits: image x tiles beyond 2**31
        for tile in {0, min(1, each - 1), each // 2, each - 1}:
            at, first, count = numbers(plan.plan_tile, 3, image * each + tile, pixels)
            assert (at, first, count) == (image, tile * TILE, min(TILE, pixels - tile * TILE)) and count > 0


@pytest.mark.parametrize("tiles", [1, 2, 7, 113, 1024, 1025, 100_000])
@pytest.mark.parametrize("blocks", [1, 9, 100, 768, 5000])
def test_groups_are_all_tiles_once_and_their_sums_stay_small(plan, tiles, blocks):
    for floats in (1, 19 * 2048, 240 * 4096):
        each, groups = numbers(plan.plan_groups, 2, tiles, blocks, floats)
        assert (groups - 1) * each < tiles <= groups * each
        assert groups == 1 or groups * floats * 4 <= 32 * KIB * KIB
        assert (groups - 1) * blocks <= 1024 + blocks


@pytest.mark.parametrize("classes_of_warp", [20, 32])
def test_every_class_has_a_warp_and_every_warp_whole_steps(plan, classes_of_warp):
    for num_classes in range(1, 241):
        out = (ctypes.c_int64 * 3)()
        plan.plan_warps(ctypes.c_int64(num_classes), classes_of_warp, out)
        groups, slices, count = out
        assert (groups - 1) * classes_of_warp < num_classes <= groups * classes_of_warp
        assert groups * slices <= count <= 12 and 64 // slices % 16 == 0 and 32 // slices % 2 == 0


@pytest.mark.parametrize("width", [2, 4])
def test_shared_memory_does_not_overlap_and_fits(plan, width):
    """163 KB a block on sm_80 and more on sm_90 and sm_100; 99 KB on sm_86 and sm_89, where at most 128 classes are taken."""

    def shared(function, *arguments):
        out = (ctypes.c_int64 * 7)()
        function(width, *(ctypes.c_int64(a) for a in arguments), out)
        return list(out)

    for num_classes in range(1, 241):
        for formed, gradient in ((num_classes, 0), (num_classes, num_classes), (0, num_classes)):
            stages, stage, proto_at, weights_at, pixels_at, total, of_warp = shared(plan.plan_shared, formed, gradient)
            padded = -(-formed // of_warp) * of_warp
            assert weights_at >= stages * stage and weights_at >= padded * 72 * 4
            assert pixels_at - weights_at >= (num_classes * 64 * width if gradient else 0)
            assert all(at % 16 == 0 for at in (stage, proto_at, weights_at, pixels_at))
            assert total <= (99 if num_classes <= 128 else 163) * KIB, f"{num_classes} classes: {total} bytes"
    for forms_logits, groups in itertools.product((0, 1), (1, 2, 4)):
        _, _, _, weights_at, pixels_at, total, _ = shared(plan.plan_prototype_shared, forms_logits, groups)
        rows = max(32, groups * (20 if width == 4 else 32))  # of weights, and four warps' sums of them for the bias
        assert weights_at % 16 == 0 and pixels_at % 16 == 0 and pixels_at - weights_at == rows * 72 * 4
        assert total + 4 * rows * 4 <= 99 * KIB


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("limit", [99, 163, 227])
def test_classes_in_blocks_fit_every_device_and_their_slices_are_all_channels(plan, width, limit):
    chunk = 64 if width == 2 else 32
    for formed, dim in itertools.product((0, 1), (1, 64, 65, 256, 2048, 2100)):
        out = (ctypes.c_int64 * 7)()
        plan.plan_streamed(width, formed, ctypes.c_int64(dim), ctypes.c_int64(limit * KIB), out)
        total, chunks, forward, *_ = out
        assert total + chunks * chunk * 68 * 4 <= limit * KIB and forward <= limit * KIB
        assert chunks >= 1 and (chunks == 1 or chunks * chunk < 2 * dim) and chunks * chunk <= 256


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dim", [1, 24, 64, 256, 257, 512, 1000, 1024, 2048, 2100, 3000, 4096])
def test_one_pass_gives_every_channel_to_one_block_and_its_memory_does_not_overlap(plan, width, dim):
    chunk, row, of_warp = (64, 72, 32) if width == 2 else (32, 68, 20)
    for num_classes in range(1, 33):
        out = (ctypes.c_int64 * 30)()
        plan.plan_one_pass(width, ctypes.c_int64(num_classes), ctypes.c_int64(dim), out)
        blocks, chunks, _, x_step, proto_at, proto_step, exchange_at, logits_at, weights_at, pixels_at, total, *rest = (
            out
        )
        last_x, last_proto, first_again, *ranks = rest
        taken = [
            d for rank in range(blocks) for d in range(ranks[2 * rank], ranks[2 * rank] + ranks[2 * rank + 1] * chunk)
        ]
        assert taken[:dim] == list(range(dim)) and len(taken) < dim + chunk and max(ranks[1 : 2 * blocks : 2]) == chunks
        padded, groups = -(-num_classes // of_warp) * of_warp, -(-num_classes // of_warp)
        assert blocks in (1, 2, 4, 8) and x_step == chunk * row * width
        assert (
            last_x + x_step == proto_at
            and last_proto + proto_step <= logits_at
            and first_again == proto_at == exchange_at
        )
        assert proto_step >= width * max(padded * (72 if width == 2 else 32), 32 * (72 if width == 2 else 36))
        sums = of_warp * (2 if width == 2 else 4) + (8 if width == 2 else 4)
        assert logits_at - exchange_at >= (2 if groups <= 2 else 0) * sums * 32 * 4
        assert (
            weights_at - logits_at >= padded * 72 * 4
            and pixels_at - weights_at >= 32 * 64 * width
            and total - pixels_at == 64 * 40
        )
        assert all(at % 16 == 0 for at in (x_step, proto_at, proto_step, logits_at, weights_at, pixels_at))
        assert total <= 227 * KIB and (total <= 113 * KIB or blocks == 8)


def test_the_weights_of_a_pixel_are_found_by_their_words(plan):
    for cls in range(32):
        for pixel in range(TILE):
            assert plan.plan_pixel_of_word(2, plan.plan_weight_place(cls, pixel) // 2) == pixel
            assert plan.plan_pixel_of_word(4, cls * 72 + pixel) == pixel
    assert all(plan.plan_pixel_of_word(4, cls * 72 + beyond) >= TILE for cls in range(32) for beyond in range(TILE, 72))


@pytest.mark.parametrize("pixels", [1, 255, 256, 257, 14651, 262_144, 2**33 + 7])
def test_the_labels_are_counted_once_by_at_most_128_blocks(plan, pixels):
    each, blocks = numbers(plan.plan_one_pass_count, 2, pixels)
    assert (blocks - 1) * each < pixels <= blocks * each and blocks <= 128 and each % 256 == 0
