"""The project's own tests drive pytest with the plugin in it: pytester."""

pytest_plugins = ["pytester"]
