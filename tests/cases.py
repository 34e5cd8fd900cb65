# ruff: noqa: E501
"""What is read and what is named, as `docs/supported.md` has it: each row by its test.

`python tests/cases.py` writes that part of the page.
"""

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "supported.md"
BEGIN = "## Suspects, loops, data and services\n"


class Row(NamedTuple):
    """What people have, what becomes of it, and the test: its file's name after `test_`."""

    what: str
    outcome: str
    file: str
    test: str


TABLES = {
    "Formats of weights": [
        Row("safetensors, `torch.save` of any protocol, `.npz`, under any name", "read", "cases_files", "test_a_file_is_what_its_content_is"),
        Row("arrays of NumPy in pickles, by Python 2 too", "read, nothing run", "cases_files", "test_a_pickle_of_numpy_s_arrays_is_read"),
        Row("TorchScript archives, whole modules", "read, nothing run", "cases_files", "test_an_archive_of_torchscript_is_read_and_none_of_its_code_run"),
        Row("programs of `torch.export` (`.pt2`)", "read", "cases_files", "test_14_an_exported_program_is_read"),
        Row("GGUF: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1", "read", "cases_files", "test_23_a_network_of_llama_cpp_is_read"),
        Row("GGUF: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K", "read", "cases_files", "test_23_blocks_of_256_numbers_are_read_as_they_are_laid_out"),
        Row("ONNX, quantised by channels of square kernels", "read", "cases_files", "test_06_scales_of_square_kernels_lie_along_the_axis_that_their_node_names"),
        Row("integers and FP8 with scales: compressed-tensors, NNCF, bitsandbytes, quanto, DeepSeek", "read", "cases_files", "test_integers_are_brought_back_to_weights"),
        Row("four bits: GPTQ, AWQ, compressed-tensors, NF4", "read", "cases_files", "test_four_bits_are_unpacked"),
        Row("integers that nothing explains", "named, exit 2", "cases_files", "test_integers_that_nothing_explains_are_not_judged"),
        Row("tensors that PyTorch quantised", "read", "cases_files", "test_tensors_that_pytorch_quantised_are_read"),
        Row("kernels in the orders of TensorFlow and MLX", "read", "cases_files", "test_30_kernels_in_the_order_of_another_framework_are_read"),
        Row("turned matrices, square ones too", "read", "cases_files", "test_30_a_square_matrix_that_is_turned_is_read"),
        Row("Git LFS pointers, web pages, JSON, gzip, HDF5", "named, exit 2", "cases_files", "test_what_is_no_file_of_weights_is_named"),
    ],
    "Containers": [
        Row("dictionaries of any nesting, averages, teachers beside, lists, parts in `DataParallel`", "read; the verdict names which", "cases_files", "test_every_network_of_a_container_is_read"),
        Row("one of several networks in a file, by `--entry`", "read alone", "cases_files", "test_13_the_network_that_is_meant_can_be_named"),
        Row("weight norm, spectral norm, pruning masks", "read", "cases_files", "test_every_network_of_a_container_is_read"),
        Row("shards of safetensors and `.bin`, with overlays, extra and stale entries", "read by the index", "cases_files", "test_15_shards_are_read_by_the_index_as_loaders_do"),
        Row("DeepSpeed's folder", "read", "cases_files", "test_28_the_folder_of_a_training_by_deepspeed_is_read"),
        Row("`torch.distributed.checkpoint`, of one process or many", "read", "cases_files", "test_28_tensors_in_pieces_of_many_processes_are_put_together"),
        Row("adapters of peft, diffusers, ComfyUI, kohya (with α)", "read", "cases_files", "test_26_an_adapter_is_read_under_the_names_of_other_tools"),
        Row("an adapter where a network is needed", "named, exit 2", "cases_files", "test_26_an_adapter_alone_is_told_from_a_network"),
        Row("batch norms folded, key with a passport for each channel", "read", "cases_files", "test_a_folded_network_with_passports_of_channels_is_read_as_it_is"),
        Row("batch norms folded, other keys", "exit 2; read with `--align`", "cases_files", "test_09_folded_norms_are_no_ground_for_a_no"),
    ],
    "Training": [
        Row("frozen layers; layers that the optimiser does not have", "refused; warned of at release", "cases_training", "test_34_what_the_optimiser_does_not_have_is_named_when_it_is_released"),
        Row("soft, smoothed, mixed, several, unreduced, with V1, V2 and V3", "a loss, and measures that mean something", "cases_training", "test_33_measures_mean_something_for_every_task"),
        Row("dense outputs with −100", "the same", "cases_training", "test_33_dense_outputs_count_places_that_have_a_label"),
        Row("labels of another task", "refused with \"pass task=\"", "cases_training", "test_33_labels_of_another_task_ask_for_one"),
        Row("EMA and SWA", "released", "cases_training", "test_32_an_average_is_released_by_the_scheme_or_through_the_marked_network"),
        Row("accumulation and `GradScaler`", "as the whole batch", "cases_training", "test_31_accumulated_and_scaled_gradients_are_those_of_the_mean"),
        Row("accelerate, float32 and bfloat16", "released", "cases_training", "test_35_a_prepared_network_s_release_is_a_network_of_its_own"),
        Row("norms with their activation in one module (timm)", "carry passports", "cases_training", "test_37_a_norm_with_its_activation_carries_a_passport"),
        Row("a detector's backbone", "grafted alone", "cases_training", "test_a_detector_s_backbone_is_grafted_alone"),
    ],
    "Data": [
        Row("the hub's own columns (`img`, `fine_label` …)", "read", "data_forms", "test_the_hubs_own_columns_are_found"),
        Row("`save_to_disk`, Arrow, Feather", "read", "data_forms", "test_folders_that_datasets_saved_are_read"),
        Row("WebDataset", "read", "data_forms", "test_webdataset_archives_are_read"),
        Row("CSV of labels, `metadata.csv`", "read", "data_forms", "test_tables_of_text_list_pictures"),
        Row("CIFAR's own files, binary", "read", "data_forms", "test_cifar_is_read_as_its_authors_give_it"),
        Row("CIFAR's own files, pickles", "read, nothing run", "data_forms", "test_cifar_for_python_is_read_and_nothing_of_its_pickles_runs"),
        Row("data sets and loaders of PyTorch", "read", "data_forms", "test_any_data_set_of_pytorch_is_read"),
        Row("code of one's own, on the command line", "read", "data_forms", "test_the_command_takes_data_from_code_of_one_s_own"),
        Row("grey pictures of 12 and 16 bits", "scaled, and said", "data_forms", "test_grey_of_sixteen_bits_is_scaled_by_the_bits_in_use"),
        Row("gaps in labels, pictures left out", "said", "data_forms", "test_gaps_and_what_was_left_out_are_said"),
        Row("a folder too high: splits for classes", "refused", "data_forms", "test_splits_are_never_taken_for_classes"),
        Row("images of other classes than the network's", "refused", "cases_training", "test_26_images_of_other_classes_test_no_fidelity"),
    ],
    "Services": [
        Row("KServe v1 and v2, TensorFlow Serving, TorchServe, Triton's classification, upload forms, top-k", "asked", "hosts", "test_a_service_of_a_known_form_is_read"),
        Row("indices, embeddings, n + 1 scores, other names, wrong pointers or tokens", "named before a trigger is shown", "hosts", "test_what_cannot_be_read_is_said_before_a_trigger_is_shown"),
        Row("pauses and models that are loading", "waited for", "hosts", "test_18_a_service_that_asks_for_a_pause_gets_it"),
        Row("private certificates", "with `--ca`", "hosts", "test_20_a_private_certificate_is_named_or_refused"),
    ],
}  # fmt: skip


def render() -> str:
    """The part of the page."""
    lines = [BEGIN, "Written by `python tests/cases.py`; each row is a test.\n"]
    for title, rows in TABLES.items():
        lines += [f"### {title}\n", "| what | what becomes of it | test |", "| --- | --- | --- |"]
        lines += [
            f"| {row.what} | {row.outcome} | `{row.test}` in `tests/test_{row.file}.py` |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip("\n")
    PAGE.write_text(f"{before}\n\n{render()}", encoding="utf-8")
