"""Which hints a situation runs, which another test runs, and which nothing runs yet, with a reason.

A new hint without an entry fails tests/test_hints.py.
"""

import importlib
from pathlib import Path

from tests.proof.hints.following import SITUATIONS, Situation

# Imported for their situations.
for _path in sorted(Path(__file__).parent.glob("*_situations.py")):
    importlib.import_module(f"tests.proof.hints.{_path.stem}")

_ROLLBACK = "tests/bump/test_rollback.py::"
_FORCED = f"{_ROLLBACK}test_work_that_no_state_holds_leaves_by_force_only_and_can_be_brought_back"
_PLAIN_FOLDER = f"{_ROLLBACK}test_work_comes_back_in_a_folder_without_a_repository"
_BENCH = (
    "tests/bench/test_measure.py::"
    "test_bench_ends_with_median_and_spread_and_each_next_command_leads_on"
)
_LINT = "tests/checks/test_lint.py::test_"
_NODES = "tests/server/test_nodes.py::test_"
_RANKS = "tests/server/test_multi_node.py::test_"
_REFUSED = f"{_RANKS}nodes_that_cannot_serve_together_are_a_sentence_whose_hint_works"
_SYNC = "tests/server/test_node_sync.py::test_"
_LINK = "tests/machine/test_link.py::test_"
_SPARK = "tests/support/test_spark.py::test_"
_AGAIN = (
    "tests/proof/test_spark.py::test_failed_part_is_on_the_page_with_its_figures_and_runs_again"
)
_BUNDLE = "tests/install/test_bundle.py::test_"
# The test that runs the command of the hint.
ELSEWHERE = {
    "install.bootstrap_from": f"{_BUNDLE}hints_lead_on",
    "install.bundle_anew": f"{_BUNDLE}files_that_are_missing_cut_or_changed_are_named",
    "install.bundle_beside": f"{_BUNDLE}hints_lead_on",
    "install.bundle_split": f"{_BUNDLE}hints_lead_on",
    "install.unpack_bundle": f"{_BUNDLE}hint_for_a_tar_unpacks_it",
    "bump.bring_back": _FORCED,
    "bump.bring_back_gitlink": _FORCED,
    "bump.bring_back_copy": _PLAIN_FOLDER,
    "bump.list_kept": _PLAIN_FOLDER,
    "bump.pop_edits": _FORCED,
    "bump.rollback_force": _FORCED,
    "bump.smoke_or_force": _FORCED,
    "core.list_folders": (
        "tests/machine/test_proposal.py::"
        "test_dotenv_that_has_no_room_is_a_sentence_with_a_look_at_its_folders"
    ),
    "machine.drop_caches_yes": (
        "tests/machine/test_page_cache.py::test_root_agrees_first_and_takes_no_program_of_the_users_path"
    ),
    "server.try_it": (
        "tests/server/test_server.py::"
        "test_server_is_ready_when_it_completes_and_leaves_nothing_when_stopped"
    ),
    "cli.after_dashes": "tests/test_entrances.py::test_misuse_is_a_sentence_and_exits_2",
    "machine.completion": (
        "tests/machine/test_doctor_machine.py::test_hint_for_a_shell_without_completion_is_enough"
    ),
    "machine.make_own_folder": (
        "tests/machine/test_doctor_machine.py::"
        "test_place_below_a_folder_of_others_is_made_and_that_folder_stays_theirs"
    ),
    "machine.move_file": (
        "tests/machine/test_doctor_machine.py::"
        "test_file_in_the_place_of_a_folder_is_moved_by_the_hint"
    ),
    "machine.git_identity": (
        "tests/machine/test_doctor_machine.py::"
        "test_git_without_a_name_or_an_address_is_a_row_with_the_command_that_sets_both"
    ),
    "bump.source_auto": (
        "tests/bump/test_forks.py::test_fork_is_pinned_and_followed_only_on_request"
    ),
    "repo.fork_example": (
        "tests/repo/test_forks.py::"
        "test_branch_of_a_fork_without_tags_takes_the_wheel_of_the_release_that_it_stands_on"
    ),
    "repo.whole_name": (
        "tests/repo/test_forks.py::test_tag_and_branch_of_one_name_need_the_whole_name"
    ),
    "repo.add_trailer": (
        "tests/repo/test_export_refusals.py::"
        "test_hint_for_a_missing_trailer_is_enough_and_takes_no_staged_edit"
    ),
    "repo.commit_patches": (
        "tests/repo/test_export_refusals.py::"
        "test_export_names_the_commit_of_its_patches_in_a_repository"
    ),
    "machine.other_gxx": (
        "tests/machine/test_doctor.py::"
        "test_screen_has_a_line_for_what_is_well_and_the_command_for_what_is_not"
    ),
    "checks.install_pre_commit": f"{_LINT}absent_pre_commit_is_a_row_and_its_hint_installs_one",
    "checks.lint_again": (
        f"{_LINT}failing_check_stops_the_push_and_the_same_gate_passes_afterwards"
    ),
    "checks.without_lint": f"{_LINT}broken_pre_commit_is_not_taken_for_a_fault_of_the_change",
    "bench.add_starts": _BENCH,
    "bench.after_change": _BENCH,
    "bench.compare_these": _BENCH,
    "bench.label_example": (
        "tests/bench/test_measure.py::test_label_is_given_afterwards_and_an_invalid_one_has_a_hint"
    ),
    "repo.connect_submodule": (
        "tests/repo/test_checkout.py::test_submodule_that_was_moved_is_connected_by_the_hint"
    ),
    "repo.merged_request": (
        "tests/repo/test_pull_requests.py::test_request_that_main_has_is_refused_at_once"
    ),
    "repo.squash": (
        "tests/repo/test_pull_requests.py::test_squash_is_offered_where_only_the_net_change_applies"
    ),
    "repo.squash_subject": (
        "tests/repo/test_pull_requests.py::"
        "test_subject_for_several_patches_is_refused_with_the_squash"
    ),
    "repo.trust": (
        "tests/repo/test_checkout.py::test_checkout_of_another_user_has_a_hint_to_trust_it"
    ),
    "install.bisect_reset": (
        "tests/install/test_rebuild.py::"
        "test_rebuild_in_the_middle_of_a_bisect_names_it_and_the_command_that_ends_it"
    ),
    "install.wheel_for_gpu": (
        "tests/install/test_plan.py::test_build_for_a_gpu_that_is_not_here_is_packed_and_not_smoked"
    ),
    "machine.apt_libnuma": (
        "tests/machine/test_doctor_shell.py::test_missing_libnuma_is_named_and_its_package_cures_it"
    ),
    "machine.add_address": f"{_LINK}address_of_nodes_toml_that_the_interface_lacks_fails",
    "machine.apt_verbs": f"{_LINK}what_keeps_nccl_from_rdma_is_named",
    "machine.firewalld_allow": f"{_LINK}firewall_that_is_on_has_the_command_that_opens_the_link",
    "machine.linger": f"{_LINK}sessions_that_lose_their_semaphores_are_named",
    "machine.list_kernels": f"{_LINK}releases_that_are_known_to_break_have_a_source_each",
    "machine.list_links": f"{_LINK}link_that_is_down_or_slow_is_named",
    "machine.memlock": f"{_LINK}limit_of_locked_memory_matters_with_rdma_only",
    "machine.rdma_links": f"{_LINK}what_keeps_nccl_from_rdma_is_named",
    "machine.ufw_allow": f"{_LINK}firewall_that_is_on_has_the_command_that_opens_the_link",
    "machine.verbs_rights": f"{_LINK}what_keeps_nccl_from_rdma_is_named",
    "server.clock": f"{_SYNC}differences_that_no_sync_ends_have_a_command_each",
    "server.commit_all": f"{_SYNC}sync_refuses_what_no_commit_or_patch_has",
    "server.inventory": f"{_SYNC}differences_that_no_sync_ends_have_a_command_each",
    "server.node_sync": f"{_SYNC}sync_makes_a_second_clone_that_is_equal",
    "server.on_node": f"{_SYNC}sync_makes_a_second_clone_that_is_equal",
    "server.pull_node": f"{_SYNC}sync_makes_a_second_clone_that_is_equal",
    "server.set_mtu": f"{_SYNC}differences_that_no_sync_ends_have_a_command_each",
    "server.sync_bundle": f"{_SYNC}sync_sends_a_bundle_to_a_node_that_fetches_nothing",
    "server.update_node": f"{_SYNC}differences_that_no_sync_ends_have_a_command_each",
    "server.copy_key": f"{_NODES}a_node_that_ssh_does_not_reach_is_named_with_its_reason",
    "server.first_nodes": f"{_NODES}first_nodes_come_from_the_example",
    "server.form_of_nodes": f"{_NODES}unusable_nodes_are_a_sentence_and_exit_2",
    "server.install_ssh": f"{_NODES}a_machine_without_ssh_has_the_package_as_hint",
    "server.known_key": f"{_NODES}a_node_that_ssh_does_not_reach_is_named_with_its_reason",
    "server.divide": _REFUSED,
    "server.fetch_on_each": (
        "tests/server/test_fetch.py::test_model_is_fetched_once_and_then_needs_no_hub"
    ),
    "server.node_status": f"{_RANKS}node_that_is_not_fit_for_its_rank_is_named",
    "server.own_addresses": f"{_RANKS}meeting_point_that_is_not_of_this_machine_is_named",
    "server.serve_over": _REFUSED,
    "server.two_nodes": f"{_RANKS}recipe_for_two_nodes_is_not_started_on_one",
    "server.without_nodes": _REFUSED,
    "server.nodes": f"{_NODES}an_unknown_name_lists_the_known_ones",
    "server.ssh": f"{_NODES}a_node_that_ssh_does_not_reach_is_named_with_its_reason",
    "support.spark_again": f"{_SPARK}record_of_another_machine_or_pin_is_refused_and_kept",
    "support.spark_bootstrap": _AGAIN,
    "support.spark_plan": f"{_SPARK}parts_without_memory_are_refused_before_anything_runs",
    "support.spark_quick": _AGAIN,
    "support.spark_resume": f"{_SPARK}interrupt_leaves_no_process_and_names_what_is_kept",
    "support.spark_yes": f"{_SPARK}nothing_is_started_without_a_yes_and_the_hint_leads_on",
    "server.adapter": (
        "tests/server/test_request.py::test_adapter_is_served_by_the_command_of_the_hint"
    ),
    "bench.log_fix": (
        "tests/bench/test_bisect.py::test_bad_merge_base_is_reported_as_fixed_before_the_good_end"
    ),
    "bench.log_range": (
        "tests/bench/test_bisect.py::"
        "test_commits_that_cannot_be_tried_are_skipped_and_the_remaining_suspects_named"
    ),
    "compile.delete_external": ("tests/compile/test_externals.py::test_moved_checkout_is_refused"),
    "compile.unset_override": (
        "tests/compile/test_externals.py::test_override_to_a_missing_folder_is_reported"
    ),
    "compile.network_or_mirror": (
        "tests/compile/test_externals.py::"
        "test_hint_of_a_project_that_cannot_be_fetched_names_a_variable_for_a_copy"
    ),
    "compile.unset_external": (
        "tests/compile/test_cmake.py::"
        "test_incomplete_folder_of_an_external_project_is_named_with_its_variable_and_what_it_lacks"
    ),
    "install.delete_sandbox": (
        "tests/install/test_sandbox.py::"
        "test_sandbox_that_was_moved_is_made_anew_after_the_command_of_the_hint"
    ),
    "bump.other_states": (
        "tests/bump/test_rollback.py::"
        "test_state_whose_commit_is_gone_is_refused_with_a_look_at_the_others"
    ),
    "server.who_listens": (
        "tests/server/test_several.py::"
        "test_program_that_took_the_port_of_a_stopped_server_is_shown_by_the_hint"
    ),
    "bench.drop_series_line": (
        "tests/bench/test_bisect.py::"
        "test_patch_that_changes_nothing_on_the_pin_is_refused_until_its_line_is_gone"
    ),
    "install.kernels_auto": (
        "tests/install/test_sandbox.py::"
        "test_kernels_that_cannot_be_compiled_are_a_refusal_and_never_the_precompiled"
    ),
    "repo.pins_changed": (
        "tests/support/test_perf.py::"
        "test_pins_without_an_archive_are_refused_with_a_look_at_what_changed"
    ),
    "bench.delete_tree": (
        "tests/proof/bench/test_ab.py::test_arm_that_the_hint_deletes_is_built_anew"
    ),
    "bump.commit_vllm": (
        "tests/proof/bump/test_bump.py::"
        "test_bump_rollback_bump_and_a_pin_by_upstreams_commit_once_it_can_be_reached"
    ),
    "bump.continue_then_rollback": (
        "tests/proof/bump/test_bump.py::"
        "test_promotion_that_cannot_be_given_up_is_finished_and_rolled_back_by_the_hint"
    ),
    "machine.drop_as_root": (
        "tests/machine/test_page_cache.py::"
        "test_refusal_of_sudo_is_in_its_own_words_with_the_command_to_type"
    ),
}

# Why nothing runs the command. tests/test_hints.py parses all of them.
_REASONS = {
    "it needs another Python than that of the tests, or a machine that systemd started": """
        machine.apt_headers machine.earlyoom machine.install_python machine.uv_python
        machine.uv_python_anew""",
    "no situation yet of an A/B, a long bisect, upstream's tests, or a server on a GPU": """
        bench.ab_again bench.inspect_both bench.same_code bench.same_torch bump.test_present
        checks.only_named checks.origin checks.pytest_arguments checks.rebuild checks.server_log
        checks.timeout_or_fewer nox.upstream server.drop_caches_then server.ps_stuck""",
    "no situation yet of externals, sandboxes, device code, or a build without memory or disk": """
        compile.override_external install.again_or_native
        install.build_triton install.judge_archs install.members_lack install.rebuild_native""",
    "it needs a bump of minutes, or one that was killed": """
        bump.checkout_former bump.rollback_or""",
    "it needs a program that goes, or a file that changes, in the middle of a verb": """
        core.bootstrap_names repo.git_config""",
    "no situation was written yet": """
        repo.by_hand_reword""",
}
NOT_RUN = {name: reason for reason, names in _REASONS.items() for name in names.split()}

__all__ = ["ELSEWHERE", "NOT_RUN", "SITUATIONS", "Situation"]
