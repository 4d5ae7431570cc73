"""A debugger in a test: its VMs stay up, and one is told how to join them."""

from __future__ import annotations

import pytest

from pytest_smolvm.plugin.session import existing_fleet


def pytest_enter_pdb(config: pytest.Config) -> None:
    fleet = existing_fleet(config)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if fleet is None or reporter is None:
        return
    from pytest_smolvm.keepsake import command_line

    for vm in fleet.live_vms:
        line = command_line(vm.state_dir, "ssh", vm.vm_id)
        reporter.write_line(f"smolvm: {vm.vm_id} is up; to join it from another terminal: {line}")
