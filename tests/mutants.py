"""Mistakes that the tests must find: each is put into a copy of the library, and tests are run.

    make mutants

Each mutant names the tests that guard against it. They pass on the library as it is, and have to
fail on the copy; one that survives is reported, and the exit code is 1. `test_mutants.py` holds
that every mutant still fits the source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file`; with `new` in its place every one of `tests` fails."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "ratios of nested ranks drawn from two places alone",
        "lowrank/recover/nesting.py",
        "GOLDEN = (math.sqrt(5) - 1) / 2",
        "GOLDEN = 1 / 2",
        ("tests/recover/test_nesting.py::test_few_steps_cover_the_range_of_ratios",),
    ),
    Mutant(
        "steps over ratios as long as those of one size",
        "lowrank/recover/blocks.py",
        "rate * (1.0 if nesting is None else SLOWER)",
        "rate",
        ("tests/recover/test_nesting.py::test_steps_over_ratios_are_half_as_long",),
    ),
    Mutant(
        "recipes' figures said to be a benchmark's",
        "website/pages.py",
        '(ROOT / "recipes" / script).is_file()',
        '(ROOT / "recipes" / file).is_file()',
        ("tests/test_website.py::test_figures_name_what_wrote_them",),
    ),
    Mutant(
        "a form is not led to the methods that make it",
        "website/pages.py",
        "if name.name in texts.read(one).forms",
        "if name.name in texts.read(one).forms[1:]",
        ("tests/test_website.py::test_a_form_without_figures_leads_to_what_makes_it",),
    ),
    Mutant(
        "log-losses cut to three digits",
        "website/pages.py",
        'LOG_LOSS: ".4g"',
        'LOG_LOSS: ".3g"',
        ("tests/test_website.py::test_figures_name_what_wrote_them",),
    ),
    Mutant(
        "no frequencies where storage alone counts",
        "lowrank/methods/convolution.py",
        'STORING = (*JOINED, "tubal")',
        "STORING = JOINED",
        (
            "tests/methods/test_convolution.py::test_where_storage_alone_counts_frequencies_compete_too",
        ),
    ),
    Mutant(
        "images moved one way alone",
        "lowrank/recover/images.py",
        "torch.randint(0, 2 * most + 1,",
        "torch.randint(0, most + 1,",
        (
            "tests/recover/test_images.py::"
            "test_shifted_images_are_windows_of_the_image_with_mirrored_edges",
        ),
    ),
    Mutant(
        "states judged on changed images, and steps on the same ones",
        "lowrank/recover/blocks.py",
        "if options.vary and torch.is_grad_enabled():",
        "if options.vary and not torch.is_grad_enabled():",
        (
            "tests/recover/test_images.py::"
            "test_each_step_sees_other_images_and_states_are_judged_on_the_data",
        ),
    ),
    Mutant(
        "frequencies of a kernel truncated in the inputs' mean alone",
        "lowrank/linalg/tubal.py",
        "return (blocks + blocks.mT) / 2",
        "return (blocks + blocks.mT)[:1].expand_as(blocks) / 2",
        ("tests/linalg/test_tubal.py::test_each_frequency_has_the_metric_of_its_own",),
    ),
    Mutant(
        "the output side of a tubal SVD left as it was before frequencies met in the outputs",
        "lowrank/linalg/tubal.py",
        "up = up + more.T",
        "up = up + 0 * more.T",
        ("tests/linalg/test_tubal.py::test_in_a_metric_the_output_side_is_the_least_squares_one",),
    ),
    Mutant(
        "products counted by what is stored where the dense kernel is multiplied",
        "lowrank/nn/tubal_conv.py",
        "itemsize, torch.Size(geometry.weight_shape).numel())",
        "itemsize, params)",
        ("tests/nn/test_factored_conv.py::test_macs_are_those_of_the_convolutions",),
    ),
    Mutant(
        "an odd number padded before the image, not after",
        "lowrank/nn/geometry.py",
        "before = [n // 2 for n in total]",
        "before = [n - n // 2 for n in total]",
        ("tests/nn/test_factored_conv.py::test_an_odd_number_is_padded_after",),
    ),
    Mutant(
        "a mask that begins where it should end",
        "lowrank/linalg/gaudi.py",
        "angle = torch.pi * f * (1 / size - w - 2 * start)",
        "angle = torch.pi * f * (1 / size + w - 2 * start)",
        ("tests/linalg/test_gaudi.py::test_at_whole_entries_the_mask_is_the_run",),
    ),
    Mutant(
        "widths of columns rounded by the number of rows, as in the authors' code",
        "lowrank/train/parts/gaudi_form.py",
        "up.new_tensor([[len(up)], [down.shape[1]]])",
        "up.new_tensor([[len(up)], [len(up)]])",
        ("tests/train/test_gblr.py::test_what_is_trained_is_what_is_left",),
    ),
    Mutant(
        "the optimizer's decay shrinks widths",
        "lowrank/train/parts/gaudi_form.py",
        "self.widths.grad = self.starts.grad = None",
        "self.starts.grad = None",
        ("tests/train/test_gblr.py::test_the_optimizer_never_steps_on_widths",),
    ),
    Mutant(
        "every step of blocks cut to the last budget at once",
        "lowrank/train/gblr.py",
        "(limit - self._began) * share))",
        "(limit - self._began)))",
        ("tests/train/test_gblr.py::test_the_budget_falls_on_a_line_and_holds",),
    ),
    Mutant(
        "numbers read from where the runs were before they were moved",
        "lowrank/nn/block_lowrank.py",
        " or known.version != self.place._version",
        "",
        ("tests/nn/test_sparse_forms.py::test_for_few_tokens_only_what_is_stored_is_multiplied",),
    ),
    Mutant(
        "entries drawn by their size and not by its square",
        "lowrank/linalg/masked.py",
        "place = (2 * place - draws",
        "place = (place - draws",
        ("tests/methods/test_spectral_masked.py::test_what_is_drawn_follows_the_squares",),
    ),
    Mutant(
        "a method without data that reads them where there are any",
        "lowrank/methods/spectral_masked.py",
        "        return None\n",
        "        return stats.gram\n",
        ("tests/methods/test_spectral_masked.py::test_data_change_nothing",),
    ),
    Mutant(
        "singular values compared by the directions that they belong to",
        "lowrank/linalg/angles.py",
        "apart, whole = float((ours - theirs).norm()), float(ours.norm())",
        "apart, whole = float((w - approximation.detach().to(w)).norm()), float(ours.norm())",
        (
            "tests/linalg/test_angles.py::test_singular_values_do_not_see_directions",
            "tests/diagnose/test_comparison.py::test_pruning_of_the_same_size_stands_beside_it",
        ),
    ),
    Mutant(
        "entries taken up at the smallest gradients",
        "lowrank/train/dsl.py",
        "scores.append(slopes[name].masked_fill(kept, -1.0).flatten())",
        "scores.append((1 / (1 + slopes[name])).masked_fill(kept, -1.0).flatten())",
        ("tests/train/test_dsl.py::test_the_least_go_and_the_steepest_come",),
    ),
    Mutant(
        "momentum left to move the entries that do not count",
        "lowrank/train/dsl.py",
        "        self._hide()  # momentum",
        "        # momentum",
        ("tests/train/test_dsl.py::test_what_does_not_count_stays_zero_under_momentum_and_decay",),
    ),
    Mutant(
        "the mask of a weight (in, out) stored as if it were (out, in)",
        "lowrank/train/dsl.py",
        "kept = layer.get_buffer(KEPT).T if turned else layer.get_buffer(KEPT)",
        "kept = layer.get_buffer(KEPT).reshape(matrix.shape)",
        ("tests/train/test_dsl.py::test_conv1d_of_transformers_is_turned",),
    ),
    Mutant(
        "factors of zeros left out of the budget",
        "lowrank/train/dsl.py",
        "entries = int(ratio * whole) - factors",
        "entries = int(ratio * whole)",
        (
            "tests/train/test_dsl.py::test_the_ratio_counts_the_factors_of_zeros",
            "tests/train/test_dsl.py::test_finished_it_is_stored_as_entries_and_a_mask",
        ),
    ),
    Mutant(
        "the middle matrix of CUR fitted to the weight where inputs are known",
        "lowrank/linalg/cur.py",
        "_orthonormal(matrix, rows, metric, least)",
        "_orthonormal(matrix, rows, None, least)",
        ("tests/linalg/test_cur.py::test_all_ranks_have_the_least_squares_middle",),
    ),
    Mutant(
        "columns told apart by less than the rounding of their 16 bits",
        "lowrank/linalg/cur.py",
        "torch.finfo(weight.dtype).eps ** 0.5",
        "torch.finfo(matrix.dtype).eps ** 0.5",
        ("tests/linalg/test_cur.py::test_rounded_to_16_bits_the_product_stays_near",),
    ),
    Mutant(
        "the middle matrix multiplied into the columns of the weight",
        "lowrank/methods/cur.py",
        "(alive(columns.T).T, middle.to(weight), alive(rows))",
        "(columns @ middle.to(weight), weight.new_ones(rank).diag(), alive(rows))",
        ("tests/methods/test_cur.py::test_rows_and_columns_are_the_weights_own",),
    ),
    Mutant(
        "components of a generalized Nyström left as long as its sketches make them",
        "lowrank/linalg/nystrom.py",
        "(scale[:, None] * right)[gain]",
        "right[gain]",
        ("tests/linalg/test_nystrom.py::test_a_flat_spectrum_is_no_farther_than_zero",),
    ),
    Mutant(
        "probes drawn alike in all directions where inputs are known",
        "lowrank/linalg/nystrom.py",
        "right = safe_root(gram.to(matrix)) @ right",
        "pass",
        ("tests/linalg/test_nystrom.py::test_drawn_like_the_inputs_it_is_nearer_in_their_norm",),
    ),
    Mutant(
        "no more probes on one side of a weight than on the other",
        "lowrank/linalg/nystrom.py",
        "width = matrix.shape, rank + oversample",
        "width = matrix.shape, rank",
        (
            "tests/linalg/test_nystrom.py::test_distance_from_the_optimum",
            "tests/linalg/test_nystrom.py::test_it_is_the_formula_with_a_pseudo_inverse",
        ),
    ),
    Mutant(
        "more loss drawn lower in the gallery's plots",
        "website/pareto.py",
        "return x, HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)",
        "return x, TOP + height * (HEIGHT - TOP - BOTTOM)",
        ("tests/test_website.py::test_a_plot_puts_less_loss_lower_and_less_size_to_the_left",),
    ),
    Mutant(
        "links to headings that a page of the site does not have",
        "website/links.py",
        "return not anchor or target not in pages or anchor in pages[target].anchors",
        "return True",
        ("tests/test_website.py::test_a_site_with_broken_links_or_foreign_files_is_noticed",),
    ),
    Mutant(
        "a page text of the gallery with nothing in a field",
        "website/texts.py",
        "empty = [each for each, said in given.items() if not said]",
        "empty: list[str] = []",
        ("tests/test_website.py::test_an_incomplete_page_text_is_refused",),
    ),
    Mutant(
        "bags pooled in each of two tables before their rows are combined, as in DLRM's code",
        "lowrank/nn/quotient_remainder.py",
        "    def rows_of(self, ids: Tensor) -> Tensor:",
        "    def forward(self, input: Tensor, *more: Tensor) -> Tensor:\n"
        "        if self.bag is None:\n"
        "            return super().forward(input, *more)\n"
        "        given = (*more, None, None)[:2]\n"
        "        parts = self.quotient(self.quotients_of(input)), "
        "self.remainder(input % self.remainders)\n"
        "        pooled = (self.bag.pool(p, input, *given, self.padding_idx) for p in parts)\n"
        "        return self._combined(*pooled)\n\n"
        "    def rows_of(self, ids: Tensor) -> Tensor:",
        ("tests/nn/test_quotient_remainder.py::test_bags_of_several_ids_pool_whole_rows",),
    ),
    Mutant(
        "ids beyond the table read from the row that two tables have for them",
        "lowrank/nn/quotient_remainder.py",
        "if self.num_embeddings % self.remainders:",
        "if False:",
        (
            "tests/nn/test_quotient_remainder.py"
            "::test_an_id_that_the_table_does_not_have_is_refused",
        ),
    ),
    Mutant(
        "the longer of two tables near one, and the shorter of the rows' scale",
        "lowrank/linalg/quotients.py",
        "if len(left) > len(right):",
        "if len(left) < len(right):",
        ("tests/linalg/test_quotients.py::test_a_product_is_the_leading_pair_of_every_column",),
    ),
    Mutant(
        "longer tables given more rank",
        "lowrank/policies/mixed_dimensions.py",
        "math.floor(scale / float(rows) ** alpha + 1e-9)",
        "math.floor(scale * float(rows) ** alpha + 1e-9)",
        ("tests/policies/test_mixed_dimensions.py::test_ranks_follow_the_rule_and_use_the_budget",),
    ),
    Mutant(
        "a rule steeper than the budget asks for",
        "lowrank/policies/mixed_dimensions.py",
        "high, chosen = middle, trial",
        "low = middle",
        (
            "tests/policies/test_mixed_dimensions.py"
            "::test_without_alpha_the_smallest_table_stays_whole",
        ),
    ),
    Mutant(
        "the lengths of tables taken for their widths",
        "lowrank/policies/mixed_dimensions.py",
        "return (both + apart) // 2, (both - apart) // 2",
        "return (both - apart) // 2, (both + apart) // 2",
        ("tests/policies/test_mixed_dimensions.py::test_sides_are_read_from_costs",),
    ),
    Mutant(
        "one hash for all features",
        "lowrank/nn/unified_table.py",
        "for number in (seed, feature, lookup):",
        "for number in (seed, lookup):",
        ("tests/nn/test_unified_table.py::test_hashes_are_drawn_for_every_feature_and_spread",),
    ),
    Mutant(
        "rows of a shared table counted as single numbers",
        "lowrank/api/unifying.py",
        "rows = math.floor(ratio * numbers / width)",
        "rows = math.floor(ratio * numbers)",
        ("tests/api/test_unifying.py::test_one_table_has_the_budget_and_the_scale",),
    ),
    Mutant(
        "ids that a feature does not have read as another's",
        "lowrank/nn/unified_table.py",
        "return rows.masked_fill(outside.unsqueeze(-1), self.rows)",
        "return rows",
        ("tests/nn/test_unified_table.py::test_an_id_that_the_feature_does_not_have_is_refused",),
    ),
    Mutant(
        "a table cut into a train without pairing its digits",
        "lowrank/linalg/tensor_train.py",
        "permute(0, 3, 1, 4, 2, 5)",
        "permute(0, 1, 2, 3, 4, 5)",
        ("tests/linalg/test_tensor_train.py::test_all_ranks_are_the_table",),
    ),
    Mutant(
        "the middle core counted by one of its ranks",
        "lowrank/nn/tensor_train.py",
        "n2 * left * d2 * right",
        "n2 * left * d2",
        ("tests/nn/test_tensor_train.py::test_it_gives_the_rows_of_its_table",),
    ),
    Mutant(
        "cores drawn as if the table were one of them",
        "lowrank/methods/tensor_train.py",
        "** (1 / 6)",
        "** (1 / 2)",
        ("tests/methods/test_tensor_train.py::test_random_cores_follow_the_seed_and_the_scale",),
    ),
    Mutant(
        "gates that learn from the training batches only",
        "lowrank/train/dnis.py",
        "        if self.validate is not None:\n            self._held_out(gates, scale)\n",
        "",
        ("tests/train/test_dnis.py::test_gates_learn_from_held_out_batches_and_rows_do_not",),
    ),
    Mutant(
        "gates lost where dimensions are left out",
        "lowrank/train/parts/gated_table.py",
        "weight = table.dense_weight().detach()",
        "weight = table.rows.weight.detach()",
        ("tests/train/test_dnis.py::test_what_is_kept_computes_what_the_gates_did",),
    ),
    Mutant(
        "the rows that are read least taken for the most read",
        "lowrank/train/dnis.py",
        "counts.argsort(descending=True, stable=True)",
        "counts.argsort(stable=True)",
        ("tests/train/test_dnis.py::test_gates_find_the_dimensions_that_are_planted",),
    ),
    Mutant(
        "the columns of an MLP's last layer left where they were when its neurons are grouped",
        "lowrank/nn/routed_mlp.py",
        "own(weight[:, order] if last else weight[order])",
        "own(weight if last else weight[order])",
        (
            "tests/nn/test_routed_mlp.py::test_all_experts_are_the_dense_mlp",
            "tests/api/test_routing.py::test_with_all_experts_the_model_is_the_dense_one",
        ),
    ),
    Mutant(
        "candidates that are far behind refitted, and the near ones left",
        "lowrank/api/allocating.py",
        "if value <= NEAR * max(least, ROUNDING)]",
        "if not value <= NEAR * max(least, ROUNDING)] or [0]",
        ("tests/api/test_allocating.py::test_what_is_far_behind_before_the_refit_is_not_refitted",),
    ),
    Mutant(
        "the last components of a larger rank taken for the first",
        "lowrank/nn/lowrank_linear.py",
        "self.down.weight[:rank], self.up.weight[:, :rank]",
        "self.down.weight[-rank:], self.up.weight[:, -rank:]",
        ("tests/methods/test_resolved.py::test_several_ranks_are_cut_from_the_largest",),
    ),
    Mutant(
        "the first components hidden while a layer is cut for a step, not the last",
        "lowrank/recover/nesting.py",
        "kept = (places < width.to(inner.device))",
        "kept = (places >= rank - width.to(inner.device))",
        (
            "tests/recover/test_nesting.py::test_a_cut_layer_computes_what_the_smaller_one_does",
            "tests/recover/test_nesting.py::"
            "test_a_step_is_of_one_ratio_that_is_drawn_and_a_state_is_judged_at_all",
        ),
    ),
    Mutant(
        "keys that several devices share cut as if each had its own",
        "lowrank/engines/fused.py",
        "first = (rank // times) * size",
        "first = rank * size",
        ("tests/engines/test_fused.py::test_queries_keys_and_values",),
    ),
    Mutant(
        "the bias of a fused layer's second part put over the first one's",
        "lowrank/engines/fused.py",
        "            start += size\n    for name",
        "    for name",
        ("tests/engines/test_fused.py::test_biases_that_come_with_the_factors",),
    ),
    Mutant(
        "the length of text fixed in a graph",
        "lowrank/io/graphs.py",
        "return {0: AUTO, 1: AUTO} if is_text else {0: AUTO}",
        "return {0: AUTO}",
        ("tests/io/test_graphs.py::test_encoders_at_other_sizes",),
    ),
    Mutant(
        "a recipe run on a text that has changed",
        "lowrank/cli/recipes.py",
        "if wanted and Path(data)",
        "if not wanted and Path(data)",
        ("tests/cli/test_recipes.py::test_a_text_that_changed_is_refused",),
    ),
    Mutant(
        "keys taken for queries in attention from layers",
        "lowrank/nn/split_attention.py",
        "q, k, v = projected  #",
        "k, q, v = projected  #",
        ("tests/nn/test_split_attention.py::test_without_a_batch",),
    ),
    Mutant(
        "the states of sequences that ended dropped",
        "lowrank/nn/split_recurrent.py",
        "rest = [s[rows:] for s in state]",
        "rest = [s[rows:] * 0 for s in state]",
        ("tests/nn/test_split_recurrent.py::test_equals_torch",),
    ),
    Mutant(
        "the reset gate of a GRU before the product with the hidden state",
        "lowrank/nn/split_recurrent.py",
        "(n + r * hn).tanh()",
        "((n + hn) * r).tanh()",
        ("tests/nn/test_split_recurrent.py::test_equals_torch",),
    ),
    Mutant(
        "the padding of a transposed convolution cut on one side",
        "lowrank/nn/split_conv.py",
        "slice(p, side - p)",
        "slice(0, side - 2 * p)",
        ("tests/nn/test_split_conv.py::test_transposed_equals_torch",),
    ),
    Mutant(
        "fused layers split where the whole is nearer",
        "lowrank/api/parting.py",
        "site, request) < _error([one], site, request)",
        "site, request) > _error([one], site, request)",
        (
            "tests/api/test_parting.py::test_by_parts_it_is_nearer_than_as_a_whole",
            "tests/api/test_parting.py::test_one_that_is_nearer_as_a_whole_stays_whole",
        ),
    ),
    Mutant(
        "the layers of one part for those of another when fused again",
        "lowrank/nn/unfused.py",
        "return nn.Parameter(whole, requires_grad",
        "return nn.Parameter(whole.flip(0), requires_grad",
        ("tests/nn/test_unfused.py::test_layers_are_views_and_changes_of_them_come_back",),
    ),
    Mutant(
        "an error below its own rounding called nothing",
        "lowrank/linalg/gram.py",
        "return max(error, torch.finfo(metric.dtype).eps * size",
        "return max(error, 0.0 * size",
        ("tests/linalg/test_gram.py::test_an_indefinite_gram_gives_no_negative_error",),
    ),
    Mutant(
        "a singular metric left as it is",
        "lowrank/linalg/gram.py",
        "return gram + least * size * eye if singular else gram",
        "return gram",
        ("tests/linalg/test_gram.py::test_only_a_singular_metric_gets_a_ridge",),
    ),
    Mutant(
        "Vᵀ of the core's SVD taken for V, as in the authors' code of DLRT",
        "lowrank/linalg/retract.py",
        "q_h.mH * signs",
        "q_h * signs[:, None]",
        (
            "tests/linalg/test_retract.py::test_a_truncation_loses_exactly_its_tail",
            "tests/train/test_dlrt.py::"
            "test_a_truncation_loses_its_tail_and_no_more_than_the_tolerance",
        ),
    ),
    Mutant(
        "the smallest singular value left out of the tail, as in the authors' code of DLRT",
        "lowrank/linalg/retract.py",
        "squares = values.double().square()",
        "squares = values.double().square() * (torch.arange(len(values)) < len(values) - 1)",
        ("tests/linalg/test_retract.py::test_the_smallest_value_counts",),
    ),
    Mutant(
        "moments that stay in the old basis",
        "lowrank/train/parts/usv.py",
        "layer.core.weight, both_sides(left, right))",
        "layer.core.weight, lambda x: x.new_zeros(s.shape))",
        ("tests/train/test_dlrt.py::test_momentum_survives_a_change_of_basis",),
    ),
    Mutant(
        "the momentum of a dense weight turned by the wrong sides",
        "lowrank/train/parts/usv.py",
        "basis = both_sides(u.double().T, v.double())",
        "basis = both_sides(v.double().T, u.double())",
        (
            "tests/train/test_dlrt.py::"
            "test_attached_in_the_middle_of_training_it_goes_on_with_the_momentum",
        ),
    ),
    Mutant(
        "second moments carried linearly",
        "lowrank/train/parts/optimizer.py",
        "moved = carry(wide.clamp(min=0).sqrt()).square()",
        "moved = carry(wide)",
        (
            "tests/train/parts/test_optimizer.py::"
            "test_first_moments_follow_linearly_and_second_ones_by_their_roots",
        ),
    ),
    Mutant(
        "parameters that are gone stay in the optimizer",
        "lowrank/train/parts/optimizer.py",
        'group["params"][place : place + 1] = fresh',
        'group["params"][place:place] = fresh',
        ("tests/train/test_dlrt.py::test_the_optimizer_holds_exactly_the_live_parameters",),
    ),
    Mutant(
        "a tolerance that every mode of a kernel uses up alone",
        "lowrank/train/tucker.py",
        "self.tolerance / math.sqrt(2), limit",
        "self.tolerance * 2, limit",
        ("tests/train/test_tucker.py::test_a_truncation_stays_within_the_tolerance_of_the_whole",),
    ),
    Mutant(
        "kernels a tenth above their budget",
        "lowrank/train/tucker.py",
        "else self.ratio * self._whole",
        "else 1.1 * self.ratio * self._whole",
        ("tests/train/test_tucker.py::test_a_budget_is_kept_and_used",),
    ),
    Mutant(
        "no retraction: the bases leave their manifold",
        "lowrank/train/condlr.py",
        "new = agreed([retract.orthonormal(basis)])[0]",
        "new = basis.clone()",
        ("tests/train/parts/test_usv.py::test_bases_stay_orthonormal_over_a_thousand_steps",),
    ),
    Mutant(
        "the clamp reaches twice as far as the condition number allows",
        "lowrank/linalg/retract.py",
        "reach = mean * (tau - 1) / (tau + 1)",
        "reach = mean * (tau - 1) / tau",
        (
            "tests/linalg/test_retract.py::test_the_clamp_bounds_the_condition",
            "tests/train/test_condlr.py::test_the_condition_is_bounded_after_every_step",
        ),
    ),
    Mutant(
        "a step that was skipped stands for the next before_step",
        "lowrank/train/parts/base_controller.py",
        "ready, self._ready = self._ready, False",
        "ready = self._ready",
        (
            "tests/train/parts/test_base_controller.py::"
            "test_a_step_that_was_skipped_does_not_stand_for_before_step",
        ),
    ),
    Mutant(
        "acting between accumulated batches",
        "lowrank/train/parts/wrappers.py",
        "return state is None or bool(state.sync_gradients)",
        "return True",
        ("tests/train/test_plugs.py::test_accelerate_trains_the_same_model",),
    ),
    Mutant(
        "the cut hides the first components",
        "lowrank/train/maestro.py",
        "device=inner.device) < width",
        "device=inner.device) >= width",
        (
            "tests/train/test_maestro.py::test_a_layer_runs_with_its_first_components_alone",
            "tests/train/test_maestro.py::test_on_a_linear_map_it_is_the_svd",
        ),
    ),
    Mutant(
        "a lasso on single components, not on tails",
        "lowrank/train/maestro.py",
        "norms.where(there, 1).reciprocal(), 0).cumsum(0)",
        "norms.where(there, 1).reciprocal(), 0)",
        ("tests/train/test_maestro.py::test_the_gradient_of_the_lasso",),
    ),
    Mutant(
        "widths that come up more than once a round",
        "lowrank/train/parts/draws.py",
        "if self.place >= max(map(len, self._orders), default=0):",
        "if self.place >= 1:",
        ("tests/train/test_maestro.py::test_every_width_comes_up_once_a_round",),
    ),
    Mutant(
        "a layer that shrinks loses its moments",
        "lowrank/train/parts/factors.py",
        "replace_parameter(attachment.optimizer, old, new, corner(new.shape))",
        "replace_parameter(attachment.optimizer, old, new)",
        ("tests/train/test_maestro.py::test_shrinking_keeps_the_state_of_what_stays",),
    ),
    Mutant(
        "decay of the factors taken for that of their product",
        "lowrank/train/parts/product_decay.py",
        "(up, (left @ (right @ right.T)).view_as(up)),",
        "(up, up),",
        ("tests/train/test_frobenius.py::test_decay_is_that_of_the_product",),
    ),
    Mutant(
        "stable ranks that are not scaled by those at the start",
        "lowrank/train/cuttlefish.py",
        "math.ceil(full / stable_ranks[0] * stable_ranks[-1])",
        "math.ceil(stable_ranks[-1])",
        ("tests/train/test_cuttlefish.py::test_the_estimate_and_the_movement",),
    ),
    Mutant(
        "new components that change the product",
        "lowrank/train/inrank.py",
        "columns = up.new_zeros(up.shape[0], more)",
        "columns = up.new_ones(up.shape[0], more)",
        ("tests/train/test_inrank.py::test_inrank_loses_nothing_as_it_grows_and_cuts_when_told",),
    ),
    Mutant(
        "what was trained is forgotten at a merge",
        "lowrank/train/loqt.py",
        "layer.put(layer.dense_weight(), basis, self.rounds)",
        "layer.put(from_int8(layer.numbers, layer.scale), basis, self.rounds)",
        ("tests/train/test_loqt.py::test_at_full_rank_it_is_gradient_descent",),
    ),
    Mutant(
        "moments that stay in the old basis of a merge",
        "lowrank/train/loqt.py",
        "replace_parameter(self.attachment.optimizer, layer.factor, layer.factor, carry)",
        "pass",
        ("tests/train/test_loqt.py::test_a_merge_takes_the_leading_directions_of_the_gradient",),
    ),
    Mutant(
        "the full gradient of a skipped batch counts",
        "lowrank/train/loqt.py",
        "    def on_overflow(self) -> None:\n        self._collect()",
        "    def on_overflow(self) -> None:\n        pass",
        ("tests/train/test_bad_input.py::test_a_nan_gradient_harms_nothing",),
    ),
    Mutant(
        "signs that are packed the other way round",
        "lowrank/train/smmf.py",
        "* 2.0 - 1\n",
        "* -2.0 + 1\n",
        (
            "tests/train/test_smmf.py::test_it_is_the_formula",
            "tests/train/test_smmf.py::test_signs_take_one_bit",
        ),
    ),
    Mutant(
        "a loaded state in the dtype of the parameter",
        "lowrank/train/smmf.py",
        '            saved = state_dict["state"].get(key, {})',
        "            saved: dict[str, Any] = {}",
        ("tests/train/test_smmf.py::test_resumed_it_is_the_unbroken_run",),
    ),
    Mutant(
        "LOST's channels by the shortest columns of the tail",
        "lowrank/train/lost_pretraining.py",
        "longest.argsort(descending=True, stable=True)",
        "longest.argsort(descending=False, stable=True)",
        (
            "tests/train/test_lost_pretraining.py::test_it_starts_from_the_svd_of_the_true_dense_weight",
        ),
    ),
    Mutant(
        "one γ for both parts",
        "lowrank/nn/lowrank_sparse.py",
        "(self.gamma, 1.0 - self.gamma)",
        "(self.gamma, self.gamma)",
        (
            "tests/train/test_lost_pretraining.py::test_it_starts_from_the_svd_of_the_true_dense_weight",
            "tests/train/test_lost_pretraining.py::test_with_silu_it_is_the_formula_and_has_no_dense_weight",
        ),
    ),
    Mutant(
        "a layer with SiLU between its factors merged as if it were linear",
        "lowrank/nn/lowrank_sparse.py",
        'return "" if self.act is None else CURVED',
        'return ""',
        (
            "tests/train/test_lost_pretraining.py::test_with_silu_it_is_the_formula_and_has_no_dense_weight",
        ),
    ),
    Mutant(
        "gradients of a latent that stop at the mask",
        "lowrank/train/parts/latent.py",
        "coefficients = fixed * self.mask + (self.latent - fixed)",
        "coefficients = self.latent * self.mask",
        ("tests/train/test_stf.py::test_gradients_pass_straight_through",),
    ),
    Mutant(
        "coefficients chosen without regard to the length of their atoms",
        "lowrank/train/parts/latent.py",
        "score = self.latent.abs() * self.basis.weight.norm(dim=1)",
        "score = self.latent.abs()",
        ("tests/train/test_stf.py::test_forward_takes_the_s_largest_of_every_row",),
    ),
    Mutant(
        "a support that never changes",
        "lowrank/train/stf.py",
        "if self.attachment.step % self.every == 0:",
        "if self.attachment.step % self.every == self.every:",
        ("tests/train/test_stf.py::test_the_support_follows_the_task_where_a_fixed_one_cannot",),
    ),
    Mutant(
        "moments that are lost when the latent goes",
        "lowrank/train/stf.py",
        "replace_parameter(self.attachment.optimizer, layer.latent, new.value, carry)",
        "replace_parameter(self.attachment.optimizer, layer.latent, new.value)",
        ("tests/train/test_stf.py::test_frozen_the_coefficients_keep_their_moments",),
    ),
    Mutant(
        "the smallest of every group kept",
        "lowrank/linalg/nm.py",
        "order = size.topk(n, dim=-1).indices",
        "order = size.topk(n, dim=-1, largest=False).indices",
        ("tests/linalg/test_nm.py::test_the_n_largest_of_every_group_are_kept",),
    ),
    Mutant(
        "steps on what counts, instead of what is trained",
        "lowrank/train/nm.py",
        "            weight.copy_(latent)\n        self._holds = True",
        "        self._holds = True",
        (
            "tests/train/test_nm.py::test_gradients_go_straight_through_to_what_is_trained",
            "tests/train/test_nm.py::test_what_was_pruned_comes_back_when_it_grows",
        ),
    ),
    Mutant(
        "weights left dense after a step that was skipped",
        "lowrank/train/nm.py",
        "        if self._holds:\n            self._apply(None)",
        "        pass",
        ("tests/train/test_nm.py::test_a_step_skipped_for_another_layers_sake_changes_nothing",),
    ),
    Mutant(
        "rows and columns of a kernel exchanged",
        "lowrank/linalg/spatial.py",
        "weight.permute(0, 3, 1, 2)",
        "weight.permute(0, 2, 1, 3)",
        ("tests/methods/test_convolution.py::test_rows_and_columns_apart_are_found",),
    ),
    Mutant(
        "a running mean that does not shrink as the spread does",
        "lowrank/recover/batchnorm.py",
        "(running[0] - old_mean) * ratio.sqrt()",
        "(running[0] - old_mean)",
        ("tests/recover/test_batchnorm.py::test_a_layer_that_lost_its_scale_gets_it_back",),
    ),
    Mutant(
        "a convolution that counts at one position in a budget of products",
        "lowrank/api/positions.py",
        "max(round(count / least), 1)",
        "1",
        (
            "tests/api/test_macs.py::test_the_ratio_is_that_of_the_products_that_are_made",
            "tests/api/test_macs.py::test_plans_keep_it_and_edits_count_so",
        ),
    ),
    Mutant(
        "the mix of forms kept without a look at the predictions",
        "lowrank/api/planning.py",
        "tried[min(compared, key=compared.__getitem__)]",
        'tried["mixed"]',
        (
            "tests/api/test_own_forms.py::"
            "test_auto_is_never_worse_than_one_form_alone_on_held_out_rows",
        ),
    ),
    Mutant(
        "bits of a mask packed from the other end of the byte",
        "lowrank/nn/lowrank_masked.py",
        "view(len(mask), -1, BITS) << places",
        "view(len(mask), -1, BITS) << places.flip(0)",
        (
            "tests/nn/test_sparse_forms.py::test_a_bit_belongs_to_its_entry",
            "tests/nn/test_form.py::test_forward_and_dense_weight_are_numpys",
        ),
    ),
    Mutant(
        "entries chosen beside one low rank, and kept beside another",
        "lowrank/linalg/masked.py",
        "basis, sparse, mask = _chosen(",
        "_, sparse, mask = _chosen(",
        ("tests/linalg/test_masked.py::test_it_is_nearer_than_svd_and_thresholding_in_turn",),
    ),
    Mutant(
        "a basis of the outputs fitted as if the inputs were white",
        "lowrank/linalg/sparse.py",
        "weighed.T @ problem.target",
        "coefficients.T @ problem.target",
        ("tests/linalg/test_sparse.py::test_basis_and_values_are_least_squares_on_the_support",),
    ),
    Mutant(
        "the free and the sparse part drift apart",
        "lowrank/linalg/admm.py",
        "dual = dual + rho * (free - projected)",
        "dual = dual - rho * (free - projected)",
        (
            "tests/linalg/test_admm.py::test_on_a_fixed_mask_it_converges_to_the_least_squares",
            "tests/linalg/test_sparse.py::test_iterations_lower_the_error_of_the_start",
            "tests/linalg/test_masked.py::test_it_is_nearer_than_svd_and_thresholding_in_turn",
        ),
    ),
    Mutant(
        "values on a support that leave it on their second step",
        "lowrank/linalg/admm.py",
        "curvature(direction) * mask",
        "curvature(direction)",
        (
            "tests/linalg/test_admm.py::test_rows_coupled_by_a_metric_of_their_own",
            "tests/linalg/test_masked.py::test_values_on_a_mask_are_least_squares",
        ),
    ),
    Mutant(
        "the rest of a budget goes where most is saved, whatever it costs",
        "lowrank/policies/knapsack.py",
        "_Step(front.rate(chosen[sites], point), sites, point)",
        "_Step(front.errors[chosen[sites]] - front.errors[point], sites, point)",
        ("tests/policies/test_knapsack.py::test_the_rest_goes_where_a_unit_saves_most",),
    ),
    Mutant(
        "a form of its own made anew of the old weight, whatever the stream asks for",
        "lowrank/methods/resolved.py",
        "wanted.weight = nn.Parameter(moved,",
        "wanted.weight = nn.Parameter(weight.detach().to(moved),",
        ("tests/methods/test_own_forms.py::test_a_refit_serves_the_stream_that_it_reads",),
    ),
    Mutant(
        "sensitivity asks the method as given, whatever the kind of layer and the group",
        "lowrank/diagnose/one_layer.py",
        "curve = resolved.curve(group, calibration)",
        "curve = resolved.method.curve(group[0], statistics_of(group[0], calibration))",
        ("tests/api/test_crossing.py::test_sensitivity_measures_what_compress_does_to_that_layer",),
    ),
    Mutant(
        "outputs weighed in a refit by what the method is called",
        "lowrank/methods/resolved.py",
        "if isinstance(method, WeighsOutputs) else None",
        'if option.method.startswith("two-sided") else None  # type: ignore[attr-defined]',
        ("tests/api/test_names.py::test_a_method_under_another_name_gives_the_same_bytes",),
    ),
    Mutant(
        "forms compared on the rows that their statistics come from",
        "lowrank/api/request.py",
        "compares = isinstance(declared(self.method), SeveralForms)",
        "compares = False",
        ("tests/api/test_names.py::test_what_is_compared_is_judged_on_rows_that_no_statistic_saw",),
    ),
    Mutant(
        "a callable that does not say that it judges is taken for one that does not",
        "lowrank/policies/common.py",
        "policy.judges if isinstance(policy, Judging) else True",
        "policy.judges if isinstance(policy, Judging) else False",
        ("tests/api/test_names.py::test_what_is_compared_is_judged_on_rows_that_no_statistic_saw",),
    ),
    Mutant(
        "the dense stream recorded anew for every candidate",
        "lowrank/recover/workbench.py",
        "if number not in recording.calls:",
        "if number >= 0:",
        ("tests/test_trace.py::test_one_call_of_compress_enters_few_rooms_and_works_once",),
    ),
    Mutant(
        "a twin with parameters of its own",
        "lowrank/walk/surgery.py",
        "return copied(model, dict(shared))",
        "return copied(model)",
        ("tests/walk/test_surgery.py::test_a_twin_costs_no_memory_and_is_changed_alone",),
    ),
    Mutant(
        "a module replaced for a moment, and left there",
        "lowrank/walk/surgery.py",
        """    finally:
        for parent, key, child in places:
            _set(parent, key, child)""",
        """    finally:
        places.clear()""",
        ("tests/walk/test_surgery.py::test_a_module_is_replaced_for_a_moment_in_every_place",),
    ),
    Mutant(
        "the owner of a shared basis is charged for all of the group",
        "lowrank/plans/shared_basis.py",
        "first = Cost(own.params - rest.params,",
        "first = Cost(own.params,",
        ("tests/methods/test_basis_sharing.py::test_costs_add_up_to_what_is_stored",),
    ),
    Mutant(
        "a form's note once a layer",
        "lowrank/nn/form.py",
        "layers.setdefault(method.__func__, [])",
        "layers.setdefault(module, [])",
        ("tests/nn/test_own_form.py::test_from_the_plan_to_the_file_and_back",),
    ),
    Mutant(
        "a form of one's own that recovery does not refit",
        "lowrank/recover/job.py",
        "(isinstance(new, Form) and new.REFITTED)",
        "isinstance(new, LowRankLinear)",
        ("tests/nn/test_own_form.py::test_recovery_refits_it_for_the_stream_that_it_reads",),
    ),
    Mutant(
        "a sweep that judges on rows that its statistics saw, where compress does not",
        "lowrank/api/sweeping.py",
        "        hold_out=hold_out,\n",
        "        hold_out=0.0,\n",
        ("tests/api/test_sweeping.py::test_each_point_is_what_compress_gives_byte_for_byte",),
    ),
    Mutant(
        "rows that repeat counted as directions",
        "lowrank/calibration/statistics.py",
        "stats.count * share < s.shape[1]",
        "stats.count < s.shape[1]",
        ("tests/api/test_bad_efforts.py::test_singular_grams",),
    ),
    Mutant(
        "every process keeps the sums of its own rows",
        "lowrank/calibration/processes.py",
        "_through(tensor, torch.distributed.all_reduce)",
        "pass",
        ("tests/calibration/test_processes.py::test_sums_and_results_are_those_of_all",),
    ),
    Mutant(
        "labels drawn as if the other processes had no batches",
        "lowrank/calibration/gradients.py",
        "self._draws[other].skip(self.generator)",
        "pass",
        ("tests/calibration/test_processes.py::test_statistics_are_those_of_one_process",),
    ),
    Mutant(
        "a refit to the rows of one process",
        "lowrank/recover/sequential.py",
        "if self.shared:",
        "if False:",
        ("tests/api/test_processes.py::test_two_processes_make_what_one_makes",),
    ),
    Mutant(
        "new tokens mixed of one share for all similar ones, whatever their similarity",
        "lowrank/linalg/neighbours.py",
        "torch.softmax(values / temperature, 0)",
        "torch.softmax(values * 0, 0)",
        (
            "tests/linalg/test_neighbours.py::test_the_nearest_ten_are_weighted_by_a_softmax",
            "tests/api/test_extending.py::test_similar_tokens_are_named_in_lists_or_by_cosines",
        ),
    ),
    Mutant(
        "old tokens trained with the new ones",
        "lowrank/recover/new_tokens.py",
        "kept = torch.zeros_like(gradient)",
        "kept = gradient.clone()",
        ("tests/recover/test_new_tokens.py::test_new_numbers_are_trained_and_nothing_else",),
    ),
    Mutant(
        "a frozen basis made trainable when its table is resized",
        "lowrank/io/resizing.py",
        "parameter.requires_grad_(flags[name])",
        "pass",
        ("tests/io/test_resizing.py::test_what_was_frozen_stays_frozen",),
    ),
    Mutant(
        "the map of the base used for queries too",
        "lowrank/linalg/vectors.py",
        "VectorProjection(down, up.T.contiguous()",
        "VectorProjection(down, down",
        (
            "tests/linalg/test_vectors.py::test_the_error_is_the_least_there_is",
            "tests/linalg/test_vectors.py::test_recall_of_other_queries_is_above_that_of_pca",
        ),
    ),
    Mutant(
        "the metric of queries left in the map of queries",
        "lowrank/linalg/vectors.py",
        "balance(unrooted(root, up), down)",
        "balance(root.T @ up, down)",
        ("tests/linalg/test_vectors.py::test_the_error_is_the_least_there_is",),
    ),
    Mutant(
        "queries not damped",
        "lowrank/linalg/vectors.py",
        "root = output_root(asked, damp)",
        "root = output_root(asked, 0.0)",
        ("tests/linalg/test_vectors.py::test_damping_helps_where_queries_are_few",),
    ),
    Mutant(
        "errors placed by their order, not by their row in the table",
        "lowrank/page/figures.py",
        "    for number, layer in known:\n",
        "    for number, (_, layer) in enumerate(known, 1):\n",
        ("tests/page/test_document.py::test_many_layers_fit_a_desktop",),
    ),
    Mutant(
        "a cell of many experts shaded by the sum of their shares",
        "lowrank/page/figures.py",
        "layer.kept * layer.shape[0] * layer.shape[1] for",
        "layer.kept for",
        ("tests/page/test_document.py::test_experts_share_a_row_and_say_so",),
    ),
    Mutant(
        "kinds merged before there are too many",
        "lowrank/page/grid.py",
        "for stem, _ in split}) > most_rows:",
        "for stem, _ in split}) >= most_rows:",
        ("tests/page/test_grid.py::test_experts_share_a_row_where_there_would_be_too_many",),
    ),
    Mutant(
        "the one file of an earlier save left beside new shards",
        "lowrank/io/declaration.py",
        "stale[0].unlink()",
        "pass",
        ("tests/io/test_pretrained.py::test_a_save_replaces_shards_and_whole_files",),
    ),
    Mutant(
        "indices of earlier files left in two bytes",
        "lowrank/io/specs.py",
        "held[leaf] = index.to(LONG)",
        "pass",
        (
            "tests/io/test_specs.py::test_indices_of_two_bytes_become_four",
            "tests/io/test_specs.py::test_indices_of_two_bytes_in_a_transformers_model",
        ),
    ),
    Mutant(
        "faint rows multiplied in float32",
        "lowrank/linalg/gram.py",
        "t.dtype == torch.float64 or 0 < _largest(t) < FAINT for t in tensors",
        "t.dtype == torch.float64 for t in tensors",
        ("tests/linalg/test_gram.py::test_faint_rows_have_squares",),
    ),
    Mutant(
        "stand-ins whose calls are not compared with the layers'",
        "lowrank/walk/surgery.py",
        "return all(sum(one.calls for one in group) >= count for count, group in counted)",
        "return all(count >= 0 for count, _ in counted)",
        ("tests/calibration/test_stand_ins.py::test_what_cannot_be_replaced_stays_dense",),
    ),
    Mutant(
        "inputs of zeros taken for inputs",
        "lowrank/methods/resolved.py",
        "stats.count >= least and not only_zeros(stats)",
        "stats.count >= least",
        ("tests/api/test_bad_efforts.py::test_inputs_of_zeros",),
    ),
    Mutant(
        "factors loaded that are not finite",
        "lowrank/io/checkpoint.py",
        "check_finite(filled, str(path))",
        "pass",
        ("tests/io/test_damaged_numbers.py::test_a_factor_that_is_not_finite_is_told_at_load",),
    ),
)


def passes(folder: Path, test: str) -> bool:
    """Whether a test passes in this copy of the repository; False also if it cannot be run."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    return not subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


def survivors(mutant: Mutant) -> list[str]:
    """The tests that pass in spite of the mistake."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("lowrank", "tests", "website"):
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = folder / mutant.file
        source = path.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.file} has not one {mutant.old!r}"
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        return [test for test in mutant.tests if passes(folder, test)]


def main() -> int:
    every = sorted({test for mutant in MUTANTS for test in mutant.tests})
    broken = [test for test in every if not passes(ROOT, test)]
    if broken:
        print("fail without any mistake:", *broken, sep="\n  ")
        return 1
    lived = 0
    for mutant in MUTANTS:
        found = survivors(mutant)
        lived += bool(found)
        print(f"{'SURVIVED' if found else 'found':9} {mutant.what}", *found, sep="\n    not by ")
    print(f"{len(MUTANTS) - lived} of {len(MUTANTS)} mistakes found")
    return int(lived > 0)


if __name__ == "__main__":
    sys.exit(main())
