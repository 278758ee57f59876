# Sourced by the launchers: quoting, and commands that --dry_run only prints.
# shellcheck shell=bash

# What main is told to exit with when a SIGTERM stopped it before the end:
# everything is saved, and the same command goes on.
# shellcheck disable=SC2034
readonly STOPPED=75

dry_run=

# Prints words so that a shell reads them back unchanged.
quote() {
  local word separator='' quote="'" escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word || $word == *[^A-Za-z0-9_@%+=:,./-]* ]]; then
      word=$quote${word//"$quote"/"$escaped"}$quote
    fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Ends with a message about the command line.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Prints the interpreter of this folder's environment, else of the system.
find_python() {
  if [[ -x .venv/bin/python ]]; then
    echo .venv/bin/python
  else
    echo python3
  fi
}
