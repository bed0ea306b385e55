"""Customers from and to files: an upload that shows first what it would do, and a download of what the list shows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

from django import forms
from django.contrib import messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import PermissionDenied
from django.http import (
    FileResponse,
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseNotAllowed,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone

from connectors.admin import checking
from connectors.admin.bulk import message_of
from connectors.models import Connection, ImportFile
from connectors.sync import exporting, importing
from connectors.sync.importing import MAX_FILE_BYTES, MAX_FILE_ROWS
from customers import tabular
from customers.admin.customers import CustomerAdmin
from customers.admin.person import actor_of, organizations
from customers.models import Organization
from customers.privacy import sees
from customers.theme import CheckboxInput, Select

# A spreadsheet is built before the first byte of it can be sent.
MAX_XLSX_ROWS = 50_000
KINDS = {"csv": "text/csv; charset=utf-8", "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"}


class UploadForm(forms.Form):
    """A file and where its rows go."""

    organization = forms.ModelChoiceField(Organization.objects.none(), widget=Select, empty_label=None)
    connection = forms.ModelChoiceField(
        Connection.objects.none(),
        required=False,
        widget=Select,
        label="Whose ids external_id holds",
        empty_label="the file's own",
    )
    file = forms.FileField(
        help_text=f"CSV in UTF-8, or XLSX. At most {MAX_FILE_ROWS:,} rows and 10 MB.",
        widget=forms.FileInput(attrs={"class": "hub-input"}),
    )
    clear_empty = forms.BooleanField(
        required=False,
        widget=CheckboxInput,
        label="Empty cells empty the fields",
        help_text="Else they change nothing.",
    )
    ignore_unknown = forms.BooleanField(required=False, widget=CheckboxInput, label="Leave out unknown columns")

    def __init__(self, *args: Any, own: Sequence[Organization], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ids = [organization.pk for organization in own]
        self.fields["organization"].queryset = Organization.objects.filter(pk__in=ids)  # type: ignore[attr-defined] # it is a ModelChoiceField
        self.fields["connection"].queryset = Connection.objects.filter(organization__in=ids)  # type: ignore[attr-defined] # as above

    def clean_file(self) -> Any:
        file = self.cleaned_data["file"]
        if file.size > MAX_FILE_BYTES:
            raise forms.ValidationError("The file is larger than 10 MB. Use manage.py import_customers.")
        if not file.name.lower().endswith((".csv", ".xlsx", ".txt", ".tsv")):
            raise forms.ValidationError("Choose a file that ends in .csv or .xlsx.")
        return file

    def clean(self) -> None:
        organization, connection = self.cleaned_data.get("organization"), self.cleaned_data.get("connection")
        if organization and connection and connection.organization_id != organization.pk:
            self.add_error("connection", f"{connection} belongs to another organization.")


class Tables(CustomerAdmin):
    """Import and export on the list of customers."""

    def has_import_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("customers.import_customer"))

    def has_export_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("customers.export_customer"))

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path("import/", view(self.import_view), name="customers_customer_import"),
            path("import/<uuid:uid>/", view(self.confirm_view), name="customers_customer_import_confirm"),
            path("export/<str:kind>/", view(self.export_view), name="customers_customer_export"),
            *super().get_urls(),
        ]

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        query = request.GET.urlencode()
        extra = {
            "can_import": self.has_import_permission(request),
            "can_export": self.has_export_permission(request),
            "list_query": f"?{query}" if query else "",
            **(extra_context or {}),
        }
        return super().changelist_view(request, extra)

    # Import

    def import_view(self, request: HttpRequest) -> HttpResponse:
        """The form; posted, it keeps the file and shows what taking it in would do."""
        if not self.has_import_permission(request):
            raise PermissionDenied
        own = organizations(request)
        form = UploadForm(
            request.POST if request.method == "POST" else None,
            request.FILES if request.method == "POST" else None,
            own=own,
            initial={"organization": own[0].pk if own else None},
        )
        if request.method == "POST" and form.is_valid():
            given = form.cleaned_data
            # One person has one file at a time: what was left unconfirmed before goes.
            ImportFile.objects.filter(user_id=str(request.user.pk), run=None).delete()
            file = ImportFile.objects.create(
                organization=given["organization"],
                connection=given["connection"],
                user_id=str(request.user.pk),
                name=given["file"].name[-200:],
                content=given["file"].read(),
                options={"clear_empty": given["clear_empty"], "ignore_unknown": given["ignore_unknown"]},
            )
            return self._preview_page(request, file)
        context = {
            **self.admin_site.each_context(request),
            "title": "Import customers",
            "opts": self.opts,
            "form": form,
            "fields": tabular.FIELDS,
        }
        return TemplateResponse(request, "connectors/import.html", context)

    def confirm_view(self, request: HttpRequest, uid: UUID) -> HttpResponse:
        """POST has a worker take the file in, throws it away, or shows the preview again. GET only offers that."""
        if not self.has_import_permission(request):
            raise PermissionDenied
        file = self._file(request, uid)
        if file.run is not None:
            return self._run_page(request, file)
        if request.method != "POST":
            return self._page_of(request, file)
        if "discard" in request.POST:
            ImportFile.objects.filter(pk=file.pk, run=None).delete()
            self.message_user(request, f"{file.name} was thrown away. Nothing was imported.")
            return HttpResponseRedirect(reverse("admin:customers_customer_changelist"))
        if "confirmed" not in request.POST or not file.options.get("rows"):
            return self._preview_page(request, file)
        actor = actor_of(request, message=message_of(request))
        file.run = importing.accept(file, actor=actor, planned=file.options["rows"], at=timezone.now())
        self.message_user(request, f"{file.name} is taken in by a worker.", messages.SUCCESS)
        return self._run_page(request, file)

    def _preview_page(self, request: HttpRequest, file: ImportFile) -> HttpResponse:
        found = importing.preview(file, actor=actor_of(request))
        # Only what was seen may be confirmed.
        file.options = {**file.options, "rows": 0 if found.damaged else found.number}
        file.save(update_fields=["options"])
        clear = sees(request.user)
        rows = [
            (number, name, outcome, checking.differences(changes, clear=clear))
            for number, name, outcome, changes in found.rows
        ]
        return self._page_of(request, file, preview=found, rows=rows)

    def _page_of(self, request: HttpRequest, file: ImportFile, **more: Any) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"Import {file.name}",
            "opts": self.opts,
            "file": file,
            **more,
        }
        return TemplateResponse(request, "connectors/import_preview.html", context)

    def _file(self, request: HttpRequest, uid: UUID) -> ImportFile:
        own = [organization.pk for organization in organizations(request)]
        rows = ImportFile.objects.filter(uid=uid, user_id=str(request.user.pk), organization__in=own)
        file = rows.select_related("organization", "connection", "run").first()
        if file is None:
            raise Http404
        return file

    def _run_page(self, request: HttpRequest, file: ImportFile) -> HttpResponse:
        if file.run is not None and request.user.has_perm("connectors.view_syncrun"):
            return HttpResponseRedirect(reverse("admin:connectors_syncrun_change", args=[file.run.pk]))
        return HttpResponseRedirect(reverse("admin:customers_customer_changelist"))

    # Export

    def export_view(self, request: HttpRequest, kind: str) -> HttpResponseBase:
        """What the list shows under its present filter and search, as a file that the import reads back."""
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        if not self.has_export_permission(request) or not self.has_view_permission(request):
            raise PermissionDenied
        if kind not in KINDS:
            raise Http404
        back = f"{reverse('admin:customers_customer_changelist')}?{request.GET.urlencode()}"
        try:
            customers = self.get_changelist_instance(request).queryset
        except IncorrectLookupParameters:
            return HttpResponseRedirect(reverse("admin:customers_customer_changelist"))
        customers = customers.select_related(None).filter(merged_into=None)
        rows = exporting.rows(customers, connection=self._source(request), clear=sees(request.user))
        named = {"Content-Disposition": f'attachment; filename="customers.{kind}"', "Cache-Control": "no-store"}
        if kind == "csv":
            return StreamingHttpResponse(tabular.csv_lines(rows), content_type=KINDS[kind], headers=named)
        if customers.order_by().values("pk")[: MAX_XLSX_ROWS + 1].count() > MAX_XLSX_ROWS:
            text = f"These are more than {MAX_XLSX_ROWS:,} customers: export CSV, or use manage.py export_customers."
            self.message_user(request, text, messages.ERROR)
            return HttpResponseRedirect(back)
        try:
            return self._xlsx(rows, named)
        except ValueError as error:
            self.message_user(request, f"{error} Export CSV instead.", messages.ERROR)
            return HttpResponseRedirect(back)

    def _xlsx(self, rows: Iterator[Sequence[str]], headers: dict[str, str]) -> HttpResponseBase:
        file = tempfile.TemporaryFile()  # noqa: SIM115 # the answer closes it
        writer = tabular.XlsxWriter(file)
        try:
            for row in rows:
                writer.write(row)
        except BaseException:
            writer.discard()
            file.close()
            raise
        writer.close()
        file.seek(0)
        return FileResponse(file, content_type=KINDS["xlsx"], headers=headers)

    def _source(self, request: HttpRequest) -> Connection | None:
        """The system that the list is filtered by: its ids become the column external_id."""
        chosen = request.GET.get("system", "")
        if not chosen.isdecimal():
            return None
        own = [organization.pk for organization in organizations(request)]
        return Connection.objects.filter(pk=chosen, organization__in=own).first()
