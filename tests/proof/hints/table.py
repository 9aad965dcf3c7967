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
# The test that runs the command of the hint.
ELSEWHERE = {
    "bump.bring_back": _FORCED,
    "bump.bring_back_gitlink": _FORCED,
    "bump.bring_back_copy": _PLAIN_FOLDER,
    "bump.list_kept": _PLAIN_FOLDER,
    "bump.pop_edits": _FORCED,
    "bump.rollback_force": _FORCED,
    "bump.smoke_or_force": _FORCED,
    "machine.drop_caches_yes": (
        "tests/machine/test_page_cache.py::test_root_that_was_not_asked_drops_nothing_without_yes"
    ),
    "server.try_it": (
        "tests/server/test_server.py::"
        "test_server_is_ready_when_it_completes_and_leaves_nothing_when_stopped"
    ),
    "cli.after_dashes": "tests/test_entrances.py::test_misuse_is_a_sentence_and_exits_2",
    "machine.completion": (
        "tests/machine/test_doctor_machine.py::test_hint_for_a_shell_without_completion_is_enough"
    ),
    "machine.git_identity": (
        "tests/machine/test_doctor_machine.py::"
        "test_git_without_a_name_or_an_address_is_a_row_with_the_command_that_sets_both"
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
    "repo.trust": (
        "tests/repo/test_checkout.py::test_checkout_of_another_user_has_a_hint_to_trust_it"
    ),
    "install.wheel_for_gpu": (
        "tests/install/test_plan.py::test_build_for_a_gpu_that_is_not_here_is_packed_and_not_smoked"
    ),
    "machine.apt_libnuma": (
        "tests/machine/test_doctor_shell.py::test_missing_libnuma_is_named_and_its_package_cures_it"
    ),
    "server.adapter": (
        "tests/server/test_request.py::test_adapter_is_served_by_the_command_of_the_hint"
    ),
}

# Why nothing runs the command. tests/test_hints.py parses all of them.
_REASONS = {
    "it installs programs on the machine, or needs root": """
        bump.unmount install.triton_mounts machine.apt_ccache machine.apt_git machine.apt_gxx
        machine.apt_gxx_major machine.apt_headers machine.apt_patch machine.apt_procps
        machine.apt_ptxas machine.apt_toolkit machine.as_owner machine.close_folder_as_root
        machine.cuda_home_after machine.cuda_home_dotenv machine.earlyoom machine.earlyoom_on_host
        machine.install_python machine.own_files_of_root machine.own_folder machine.own_token
        machine.sudoers machine.upgrade_driver machine.uv_python machine.uv_python_anew
        repo.trust_or_own""",
    "the small world has no GPU and no engine: servers, benchmarks, bisects, the smoke": """
        bench.ab_again bench.bisect_abort bench.bisect_more bench.bisect_smoke bench.bring_back
        bench.commit_then_export bench.count_as_bad bench.delete_tree bench.drop_series_line
        bench.each_patch bench.factor_limit bench.fetch_pin bench.fetch_tag
        bench.fix_patches_first bench.good_and_bad bench.good_example bench.inspect_both
        bench.log_fix bench.log_range bench.metrics bench.no_history bench.older_good
        bench.other_bad bench.other_commit bench.predicates bench.quote_command bench.resume_other
        bench.same_code bench.same_torch bench.search_upstream bump.test_present
        checks.buildkite_status checks.differs checks.only_named checks.origin
        checks.pytest_arguments checks.rebuild checks.reinstall checks.relative_paths
        checks.server_log checks.timeout_or_fewer install.build_for_gpu inv.serve_list
        inv.serve_logs inv.serve_status inv.serve_stop machine.cpu_native machine.cuda_index
        machine.hf_login machine.pip_triton machine.set_ptxas nox.upstream server.all_flags
        server.api_key server.cpu_cache server.damaged_state server.disk_or_home
        server.drop_caches server.drop_caches_then server.edit_recipe server.edit_recipe_keys
        server.end_processes server.flags_of_config server.follow server.gate server.gpu_order
        server.gpus server.host server.install_plugin server.installed server.key_in_dotenv
        server.keys server.last_lines server.less_memory server.logs_or_stop server.max_model_len
        server.model_first server.needs_port server.network server.online_dotenv server.or_force
        server.other_port server.port server.positive server.ps_stuck server.read_or_tokenizer
        server.recipes_fit server.resume_fetch server.run_headless server.serve_recipe
        server.started server.status_or_stop server.stop_then server.token_in_dotenv
        server.tokenizer server.unset_offline server.utilization server.utilization_least
        server.vllm_help server.who_listens""",
    "it needs a build of the real tree, or of Triton": """
        bump.commit_triton bump.triton_again bump.triton_continue bump.triton_keep
        bump.triton_patch bump.triton_ref bump.triton_stash compile.check_place compile.defect
        compile.delete_external compile.disk_then_resume compile.doctor_cmake
        compile.doctor_compilers compile.network_or_mirror compile.one_job
        compile.override_external compile.rebuild_clean compile.rebuild_target compile.resume
        compile.set_folder compile.then_resume compile.triton_edits compile.triton_mirror
        compile.triton_origin compile.unset_external compile.unset_override install.after_change
        install.again_or_native install.bootstrap_rebuild install.build_triton
        install.check_triton install.copy_or_pack install.delete_sandbox install.fix_triton
        install.judge_archs install.kernels_auto install.members_lack install.native
        install.pack_again install.plan_json install.precompiled install.rebuild_differs
        install.rebuild_native install.status_defect install.triton_ref install.triton_source
        install.twice_in_dotenv install.unset_then_fix install.verb machine.ccache_config
        machine.ccache_switch machine.no_sccache machine.pip_cmake machine.pip_ninja
        machine.sccache_size support.scheduler_defect""",
    "it needs a bump of minutes, or one that was killed": """
        bump.bump bump.checkout_former bump.commit_vllm bump.continue_then_rollback
        bump.disk_of_all bump.doctor_or bump.edit_then_continue bump.export_then_again
        bump.fix_then_continue bump.git_continue bump.give_rollback_up bump.other_states
        bump.read_state bump.rollback_or bump.sandbox_commit bump.sandbox_operation
        bump.sandbox_reflog bump.stash_then_again inv.patch_continue inv.pin inv.pin_rollback""",
    "it needs another index, hub, proxy or host": """
        core.network_resumes core.wrong_hash repo.address_or_file repo.github_patch repo.heads
        repo.import_url repo.index_that_has_it repo.net_change repo.network_or_copy
        repo.network_or_index repo.set_mirror repo.source_git repo.source_release
        repo.whole_commit""",
    "the machine or a disk has to be broken": """
        cli.disk_full cli.look_further core.bootstrap_names core.cache_folder core.disk_and_rights
        core.disk_of core.disk_or_cache core.list_all core.list_files core.list_folder
        core.list_folders core.list_names core.read_log core.what_it_is machine.bootstrap_checkout
        machine.cache_folder machine.control_group machine.does_python_work
        machine.own_environment machine.python_version machine.renew_tools machine.uv_pythons
        repo.delete_file_again repo.delete_store repo.git_config repo.git_version
        repo.memory_again support.make_tools""",
    "no situation was written yet": """
        checks.bootstrap_then_hook checks.clone_first inv.env machine.drop_from_recipe
        machine.restore_torch machine.uv_setting repo.archive_layout repo.by_hand_reword
        repo.check_diff repo.other_patches repo.pins_changed""",
}
NOT_RUN = {name: reason for reason, names in _REASONS.items() for name in names.split()}

__all__ = ["ELSEWHERE", "NOT_RUN", "SITUATIONS", "Situation"]
