"""Many trainings from one command line: datasets x seeds x layers, and how far they are.

    sweep = Sweep(args, split, NOT_IN_CONFIG, defaults, stop)
    for run in sweep.runs():      # locked, its data read, its last checkpoint found
        with run.failures_booked():
            ...                   # train it
    sys.exit(sweep.exit_code)

With --tensor-parallel, rank 0 decides all that; the other ranks get its runs, and write nothing.
"""

import contextlib
import itertools
import logging
import sys
import tempfile
import traceback
from argparse import Namespace
from pathlib import Path

from steering import loading, ranks
from steering.chat_format import label_count
from steering.data_layouts import data_digest, find_datasets, requested_names
from steering.files import read_json, read_text, write_json
from steering.run import (
    ATTEMPTS,
    NoVector,
    Run,
    Standing,
    new_record,
    newest_state,
    standing,
)
from steering.run_folder import is_locked, last_speed, lock_folder, run_path, set_aside
from steering.vector_file import FORMAT_VERSION, VECTOR_FILE, load_vector, vector_digest

SHOWN_PROBLEMS = 10  # broken lines of a dataset that the log names
log = logging.getLogger("steering")


class Sweep:
    """The trainings that args ask for. split: a function of (name, datasets, chat, args) that gives
    the Splits of a dataset; not_in_config: names of options that do not change the vector;
    defaults: {option: default}; stop: a StopRequest. exit_code: the worst so far.
    ValueError if the data, a name, the model's config or the layer is not there."""

    def __init__(self, args, split, not_in_config, defaults, stop):
        self.args = args
        self.split = split
        self.not_in_config = not_in_config
        self.defaults = defaults
        self.stop = stop
        self.exit_code = 0
        if ranks.rank():
            return
        if args.print_status or args.write_todo:
            args.device = "auto"  # That of the training may not be here.
        self.datasets = find_datasets(args.data_root, args.source_model, args.kind)
        self.names = requested_names(self.datasets, args)
        if not args.print_status:  # which starts without transformers
            loading.check_layers(args.layer, args.model, args.trust_remote_code)
        self.model_digest = loading.model_digest(args.model)
        self.run_json_then = {}
        for setting in self._settings():
            for name in self.names:
                path = self.folder(setting, name) / "run.json"
                self.run_json_then[path] = modification(path)

    def _settings(self):
        """The options of each seed and layer; several seeds have a folder each, as layers do."""
        for seed in range(self.args.seed, self.args.seed + self.args.seeds):
            run_name = self.args.run_name
            if self.args.seeds > 1:
                run_name = f"{run_name}-seed{seed}" if run_name else f"seed{seed}"
            for layer in sorted({*self.args.layer}):
                changed = {"seed": seed, "run_name": run_name, "layer": layer}
                yield Namespace(**{**vars(self.args), **changed})

    def folder(self, args, name):
        """The run folder of a dataset."""
        return run_path(args.output_dir, args.model, args.layer, name, args.run_name)

    def config(self, args, name):
        """Everything but the code that determines the vector, as a JSON-able dict: what files hold,
        not where they lie, and the dtype that "auto" is here."""
        config = {}
        for key, value in vars(args).items():
            if key not in self.not_in_config:
                config[key] = value
        template = None
        if args.chat_template:
            template = read_text(args.chat_template)
        if args.init_vector:
            config["init_vector"] = vector_digest(load_vector(args.init_vector)[0])
        return config | {
            "name": name,
            "data": data_digest(name, self.datasets),
            "model_digest": self.model_digest,
            "dtype": loading.pick_dtype(args.dtype, loading.pick_device(args.device)),
            "auto_dtype": args.dtype == "auto",
            "template": template,
            "format_version": FORMAT_VERSION,
        }

    # ------------------------------------------------------------------ the trainings

    def runs(self):
        """Yield each Run that is to be trained, its folder locked until the next one is asked for.
        Whatever a dataset runs into is logged, and the next one may do better."""
        if ranks.rank():
            yield from self._runs_on_other_ranks()
            return
        chat = loading.load_chat(
            self.args.model, self.args.chat_template, self.args.trust_remote_code
        )
        for doubt in chat.doubts:
            log.warning(f"WARNING: {doubt}")
        if self.args.include_missing_scores:
            log.warning("WARNING: --include-missing-scores trains on rows that nobody scored")
        known = {}  # states of the dataset's rows
        for args, name, later in self._trainings():
            if ranks.size() > 1:  # The ranks would not know the same.
                later = []
            try:
                with self._opened(name, args, chat) as run:
                    if run is not None:
                        run.other_layers = self._layers_to_train(later, name)
                        run.known_states = known
                        yield run
                        known = run.known_states
                        self.exit_code = max(self.exit_code, run.exit_code)
            except (ValueError, OSError) as error:
                log.error(f"error: {error}")
                self.exit_code = max(self.exit_code, 2)
            except Exception as error:  # of whatever is in the data
                log.error(f"FAILED   {name}: {error!r}")
                traceback.print_exc()
                self.exit_code = max(self.exit_code, 1)
            if not later:
                known = {}  # The next dataset has other rows.
            if self.stop.exit_code:
                self.exit_code = self.stop.exit_code
                return

    def _trainings(self):
        """[(options, name, options of the dataset's next layers), ...]: seed by seed, all layers of
        a dataset one after the other. Among ranks, those that failed come last, since one may end
        them all."""
        found = []
        for _, settings in itertools.groupby(self._settings(), lambda args: args.seed):
            at_layers = list(settings)
            for name in self.names:
                for number, args in enumerate(at_layers):
                    found.append((args, name, at_layers[number + 1 :]))
        if ranks.size() > 1:
            found.sort(key=lambda job: status_of(self.folder(job[0], job[1])) == "failed")
        return found

    def _layers_to_train(self, settings, name):
        """The layers of those options at which a dataset has no vector yet, or gets a new one."""
        layers = []
        for args in settings:
            if args.restart or not (self.folder(args, name) / VECTOR_FILE).exists():
                layers.append(args.layer)
        return layers

    def _runs_on_other_ranks(self):
        for args, state, splits in ranks.jobs():
            with tempfile.TemporaryDirectory() as folder:
                yield Run(Path(folder), state, args, splits, self.stop)

    @contextlib.contextmanager
    def _opened(self, name, args, chat):
        """Context: the Run of a dataset, or None if there is nothing to train. ValueError: bad
        input, or a folder that holds another run."""
        folder = self.folder(args, name)
        config = self.config(args, name)
        if not args.restart:
            if self._nothing_to_do(folder, name, config):
                yield None
                return
            # A run goes on with the date that its prompts began with.
            chat = chat.at(read_json(folder / "run.json").get("date"))
        splits = self.split(name, self.datasets, chat, args)
        warn_of_problems(splits.filtered.problems)
        if not splits.filtered.is_baseline and not sum(map(label_count, splits.train)):
            raise ValueError(f"{name}: no example left to train on. {splits.filtered.counts()}")

        with lock_folder(folder) as held:
            # While the data was read, another process may have begun or finished it.
            done = not args.restart and standing(folder, config, self.defaults).verdict == "done"
            if done or not held:
                log.info(f"{name}: another process was faster, {folder}")
                yield None
                return
            if args.restart:
                set_aside(folder)
            state = newest_state(folder, config, self.defaults)
            record = new_record(folder, name, config, state, vars(args))
            record |= {"counts": splits.counts(), "questions": splits.question_hashes()}
            record |= {"date": chat.date, "end_of_turn": chat.end_of_turn}
            if not splits.train:
                log.info(f"{name}: skipped, no examples: no scores ({splits.filtered.counts()})")
                write_json(folder / "run.json", record | {"status": "skipped"})
                yield None
                return
            if record["code_changes"]:
                files = ", ".join(record["code_changes"])
                log.warning(f"WARNING: going on with other code: {files}")
            run = Run(folder, state, args, splits, self.stop)
            run.record = record
            if record["attempts"] > ATTEMPTS:
                with run.failures_booked():
                    raise NoVector(f"its process died {ATTEMPTS} times in a row")
                self.exit_code = max(self.exit_code, run.exit_code)
                yield None
                return
            ranks.from_rank_0((args, state, splits))  # a job for the others
            yield run

    def _nothing_to_do(self, folder, name, config):
        """Whether a dataset is done or in other hands, as the log says; ValueError if refused."""
        found = standing(folder, config, self.defaults)
        if found.verdict == "done":
            if found.changed:
                files = ", ".join(found.changed)
                log.warning(f"WARNING: {name} is done, but by other code: {files}")
            log.info(f"{name}: done already, {folder}")
            return True
        if found.verdict == "busy" or self._failed_meanwhile(folder):
            log.info(f"{name}: skipped, another process works in {folder}, or just failed there")
            return True
        if found.verdict == "other code" and self.args.accept_code_change:
            return False
        if found.reason:
            raise ValueError(found.reason)
        return False

    def _failed_meanwhile(self, folder):
        """Whether somebody, this process too, has failed in the folder since this sweep began.
        run.json was written since then if its time is another, whatever clock wrote it."""
        path = folder / "run.json"
        return status_of(folder) == "failed" and modification(path) != self.run_json_then.get(path)

    # ------------------------------------------------------------------ how far it is

    def write_todo(self, path):
        """Write the names that are neither done nor in a process's hands to a file, one a line, and
        say how many. A run that is refused counts as left: training it will say what is wrong."""
        left = {}
        changed = []
        for args in self._settings():
            for name in self.names:
                found = self._standing_of(args, name)
                if found.verdict not in ("done", "busy"):
                    left[name] = True
                elif found.changed:
                    changed.append(found.changed)
        Path(path).write_text("".join(f"{name}\n" for name in left), encoding="utf-8")
        warn_of_other_code(changed)
        total = len(self.names)
        print(f"{total - len(left)} of {total} done or in work elsewhere, {len(left)} to train")

    def print_status(self):
        """Print what is done, running or failed, and the time that is left."""
        for args in self._settings():
            self._print_status(args)

    def _print_status(self, args):
        groups = {"done": 0, "running": 0, "failed": 0, "left": 0}
        seconds = []
        changed = []
        speed = 0.0
        for name in self.names:
            folder = self.folder(args, name)
            record = read_json(folder / "run.json")
            found = self._standing_of(args, name)
            if found.verdict == "done":
                group = "done"  # also while it is evaluated
                if found.changed:
                    changed.append(found.changed)
                if "wall_seconds" in record:
                    seconds.append(record["wall_seconds"])
            elif is_locked(folder):
                group = "running"
                speed += last_speed(folder)
            else:
                group = "failed" if record.get("status") == "failed" else "left"
            groups[group] += 1
            if group == "failed":
                print(f"failed   {name}: {record.get('error')}")
            elif group != "left":
                print(f"{group:<8} {name}")
        warn_of_other_code(changed)
        left = "unknown"
        if seconds:
            ahead = groups["left"] + groups["running"] / 2
            hours = ahead * sum(seconds) / len(seconds) / max(1, groups["running"]) / 3600
            left = f"{hours:.1f} h"
        counts = " / ".join(f"{count} {group}" for group, count in groups.items())
        if args.run_name:
            counts = f"{args.run_name}: {counts}"
        if len(self.args.layer) > 1:
            counts = f"layer {args.layer}: {counts}"
        total = len(self.names)
        print(f"status   {counts} of {total} | tok/s {speed:,.0f} | time left {left}")

    def _standing_of(self, args, name):
        folder = self.folder(args, name)
        try:
            return standing(folder, self.config(args, name), self.defaults)
        except (ValueError, OSError) as error:  # its data cannot be read
            return Standing("other settings", str(error))


def status_of(folder):
    """What run.json says of the run in a folder."""
    return read_json(folder / "run.json").get("status")


def modification(path):
    """When a file was written, by the clock of its file system; None if there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def warn_of_problems(problems):
    """Log the first broken lines of a dataset, and how many more there are."""
    for problem in problems[:SHOWN_PROBLEMS]:
        log.warning(f"WARNING: {problem}")
    if len(problems) > SHOWN_PROBLEMS:
        log.warning(f"WARNING: ... and {len(problems) - SHOWN_PROBLEMS} more broken lines")


def warn_of_other_code(changed):
    """Say on stderr which finished runs are by other code. changed: for each, its files."""
    if changed:
        files = ", ".join(sorted({file for files in changed for file in files}))
        text = f"WARNING: {len(changed)} of the finished runs are by other code: {files}"
        print(text, file=sys.stderr)
