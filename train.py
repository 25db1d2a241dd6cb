"""Distil a big image classifier into a small one, compress it, export it, and measure the files.

python train.py teacher=resnet50 student=mobilenet
"""

from distill import cli


@cli.command
def main(cfg):
    from distill import build, compress, export, fit, report, run  # torch is imported from here on
    from distill.compress.coverage import describe
    from distill.errors import UserError
    from distill.evaluate import evaluate
    from distill.progress import leads, say

    with run.open_run(cfg) as job, build.loggers(job.cfg, job.folder) as loggers:
        cfg, folder = job.cfg, job.folder
        say(f"run: {folder}")
        data = build.data(cfg.data)

        teacher = fit.teacher(cfg, data)
        alone = fit.student_alone(cfg, data) if cfg.baseline and job.does("distill", "report") else None

        if job.does("cache"):
            fit.fill_cache(cfg, teacher, data)
        if job.does("distill") and job.distilled():
            say(f"distill: done before, {folder / run.STUDENT}")
        elif job.does("distill"):
            student, epochs = fit.distil(cfg, teacher, data, folder, loggers)
            if leads():
                job.save_student(student, epochs, data)

        if not job.does("compress", "export", "report") or not leads():
            return
        student = job.student()
        nets = {"student": student.plain()}  # what ships, by file name
        if cfg.compress and job.compresses():
            say(f"compress: {', '.join(cfg.compress)}")
            small = compress.chain(build.steps(cfg.compress), nets["student"], data)
            nets["-".join(["student", *cfg.compress])] = small
            say(describe(small))
            job.write(compressed=list(cfg.compress))

        files, failures = {name: [] for name in nets}, []
        if job.does("export") and cfg.export:
            say(f"export: {', '.join(cfg.export)}")
            files, failures = export.export(nets, build.steps(cfg.export), folder / "export", data, job.identity())
        elif cfg.export and job.does("report"):
            files = export.reload(nets, build.reloaders(cfg.export), folder / "export")

        if job.does("report"):
            say("report: every network and every reloaded file answers the test images, once")
            networks = {
                "teacher": teacher.network if teacher.fixed else None,
                "student alone": alone,
                "student": student,
            }
            networks["student (last epoch)"] = job.student(run.STUDENT_LAST)
            rows, unlike = evaluate(networks, {name: (nets[name], files[name]) for name in nets}, data, cfg.tolerance)
            failures += unlike
            report.write(rows, folder, job.context())
            for logger in loggers:
                report.log(logger, rows, folder)
            say(report.table(rows))
            say(f"{folder}: report.md, report.json, report.png, export/")
        if failures:
            raise UserError("; ".join(failures))


if __name__ == "__main__":
    main()
