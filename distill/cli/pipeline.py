"""What a run does, top to bottom: data → teacher → student → compress → export → report."""

from omegaconf import DictConfig

from distill.cli.command import importing


def pipeline(cfg: DictConfig) -> None:
    """The stages of a run that its configuration asks for; what they find is in the run's folder.

    Raises:
        UserError: a file may not ship, or what a stage ended with.
    """
    with importing():  # torch is imported from here on
        from distill import compress, export
        from distill.cli import build, faults, forecast, pilots, rehearsal, roles
        from distill.compress.auto import exceeded, together
        from distill.data.findings import left_out
        from distill.errors import UserError
        from distill.export.deploy import write_readme
        from distill.networks.weights import content_hash
        from distill.progress import leads, say
        from distill.report import bill, diagnosis, layers, page, parity, ship, tables
        from distill.report.details import details
        from distill.report.evaluate import evaluate
        from distill.report.made import made_by
        from distill.runs import run, verdict
        from distill.runs.tables import curves
        from distill.training import divergence

    with (
        run.open_run(cfg) as job,
        faults.told(job.cfg, job.folder),
        build.loggers(job.cfg, job.folder) as loggers,
    ):
        cfg, folder = job.cfg, job.folder
        say(f"run: {folder}")
        data = build.data(cfg.data, read=job.does("check"))
        job.check_images(data)

        pilots.check(cfg, job.record["overrides"], data)
        if job.does("check"):
            forecast.tell(cfg, data, folder)
        elif job.does("cache", "distill") and not (folder / "checkpoints").exists():
            rehearsal.rehearse(cfg, data, folder)  # what can be known is told now
        if list(cfg.stages) == ["check"]:
            return
        given = job.given()  # a student that has its weights already; a teacher is only for fine-tuning
        teacher = None if given and not job.does("teacher") else roles.teacher(cfg, data)
        baseline = cfg.baseline and not given and job.does("distill", "report")
        own = cfg, data  # the student's alone
        if not given and job.does("cache", "distill", "compress", "report"):
            cfg, own, data = pilots.settle(cfg, job.record["overrides"], teacher, data, folder)
        alone = roles.student_alone(*own) if baseline else None

        if job.does("cache"):
            roles.fill_cache(cfg, teacher, data)
        if job.does("distill") and job.distilled(whole=True):
            say(f"distill: done before, {folder / run.STUDENT}")
        elif job.does("distill"):
            student, epochs = roles.distil(cfg, teacher, data, folder, loggers)
            if setbacks := epochs["last"]["setbacks"]:
                job.write(setbacks=setbacks)
            if leads():
                job.save_student(student, epochs, data)
        elif given and not job.distilled() and leads():
            job.save_student(*roles.given(cfg, data), data)

        if not job.does("compress", "export", "report") or not leads():
            return
        student = job.student()
        exporters, failures = build.steps(cfg.export), []
        nets = {"student": export.for_all(student.plain(), exporters)}  # what ships, by file name and runtime
        between = {}  # and what each compression step made
        if cfg.compress and job.compresses():
            finetune = roles.finetuning(cfg, teacher, data, folder, exporters, job.origin())
            steps, flows = build.steps(cfg.compress), [export.flow(each) for each in exporters.values()]
            small, failures = compress.compress(steps, student.plain(), data, finetune, flows)
            compressed = "-".join(["student", *steps])
            between[compressed] = small
            nets[compressed] = {flow: [*made.values()][-1] for flow, made in small.items()}
            if "auto" in steps and (spanning := together(folder, flows)):
                say(spanning)
            job.write(compressed=list(steps))

        files = {name: [] for name in nets}
        if job.does("export") and cfg.export:
            say(f"export: {', '.join(cfg.export)}")
            files, unwritten = export.export(nets, exporters, folder / "export", data, job.origin())
            failures += unwritten
        elif cfg.export and job.does("report"):
            files = export.reload(nets, build.reloaders(cfg.export), folder / "export")

        if job.does("report"):
            say("report: every network and every reloaded file answers the test images, once")
            networks = {
                "teacher": teacher.network if teacher and teacher.fixed else None,
                "student alone": alone,
                "student": student,
            }
            networks["student (last epoch)"] = None if given else job.student(run.STUDENT_LAST)
            rows, unlike, logits, labels, ways = evaluate(networks, nets, files, data, build.tolerance(cfg), between)
            failures += unlike
            over = {}
            if "auto" in cfg.compress:
                over = exceeded(rows, cfg.compress.auto.bytes, cfg.compress.auto.latency_ms)
                small = [file.path.name for name in nets if name != "student" for file in files[name]]
                if cfg.compress.auto.files == "every" or over.keys() >= set(small):
                    failures += [over[name] for name in small if name in over]
            made = [file.path.name for several in files.values() for file in several] if job.does("export") else []
            made += tables.ORDER if job.does("distill") else ()
            now = tables.Now(job.command(), job.commands()[0], content_hash(student.net)[:16], made)
            rows, earlier = tables.with_earlier(rows, folder, now)
            helped = verdict.of(logits, labels)
            metrics = None if given else curves(folder)
            figures = diagnosis.figures(logits, labels, metrics)
            say(tables.table(rows))  # first: the disk may be full
            setbacks = divergence.told(job.record.get("setbacks", ()))
            context = job.context(data) | left_out(data) | pilots.told(folder) | setbacks
            shipping = ship.advice(rows, [*failures, *earlier, *over.values()], student.net, folder)
            about = details(logits, labels, data, bill.flips(ways, labels))
            items = bill.bill(ways, {row.name: row.format for row in rows}, labels, data.classes)
            noisy = [layers.told(name, nets["student"], small, steps, data, folder) for name, small in between.items()]
            costs = bill.with_earlier(bill.told(items, filter(None, noisy)), rows, folder)
            page.write(rows, folder, context, failures + earlier, helped, figures, about, metrics, shipping, costs)
            if any(files.values()):
                write_readme(rows, data, folder / "export", failures + earlier)
            if loggers:
                build.report(loggers, made_by(rows, folder, about, *roles.taught_by(cfg, teacher, data)))
            for line in [*([helped] if helped else []), *diagnosis.findings(figures)]:
                say(line)
            for line in parity.remarks(rows):
                say(f"remark: {line}")
            for line in [*shipping, bill.remark(items, costs["layers"])]:
                if line:
                    say(line)
            exported = ", export/" if any(files.values()) else ""
            say(f"{folder}: report.html, report.md, report.json, report.png{exported}")
        if failures:
            raise UserError("; ".join(failures))
