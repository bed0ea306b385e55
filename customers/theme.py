"""The look of the admin, named in this one place and in the template of lists. The branch for the type checker is
Django's own look: put it in place of the other, and lists in Django's template, and everything works without the theme.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from django import forms
    from django.contrib import admin
    from django.contrib.admin.templatetags.admin_list import result_headers
    from django.contrib.admin.utils import display_for_field, display_for_value
    from django.contrib.auth.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
    from django.forms import CheckboxInput, CheckboxSelectMultiple, EmailInput, PasswordInput, Select, TextInput

    ModelForm: TypeAlias = forms.ModelForm[Any]
    ModelAdmin: TypeAlias = admin.ModelAdmin[Any]
    TabularInline: TypeAlias = admin.TabularInline[Any, Any]
    CHECKBOX_CLASSES: list[str] = []
    LINK_CLASSES: list[str] = []
    ROW_CLASSES: list[str] = []
else:
    from django.forms import ModelForm
    from unfold.admin import ModelAdmin, TabularInline
    from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
    from unfold.templatetags.unfold_list import CHECKBOX_CLASSES, LINK_CLASSES, ROW_CLASSES, result_headers
    from unfold.utils import display_for_field, display_for_value
    from unfold.widgets import (
        UnfoldAdminCheckboxSelectMultipleWidget as CheckboxSelectMultiple,
    )
    from unfold.widgets import (
        UnfoldAdminEmailInputWidget as EmailInput,
    )
    from unfold.widgets import (
        UnfoldAdminPasswordWidget as PasswordInput,
    )
    from unfold.widgets import (
        UnfoldAdminSelectWidget as Select,
    )
    from unfold.widgets import (
        UnfoldAdminTextInputWidget as TextInput,
    )
    from unfold.widgets import (
        UnfoldBooleanSwitchWidget as CheckboxInput,
    )

__all__ = [
    "CHECKBOX_CLASSES",
    "LINK_CLASSES",
    "ROW_CLASSES",
    "AdminPasswordChangeForm",
    "CheckboxInput",
    "CheckboxSelectMultiple",
    "EmailInput",
    "ModelAdmin",
    "ModelForm",
    "PasswordInput",
    "Select",
    "TabularInline",
    "TextInput",
    "UserChangeForm",
    "UserCreationForm",
    "display_for_field",
    "display_for_value",
    "result_headers",
]
