"""The look of the admin, named in this one place. The branch for the type checker is Django's own look: put it in place
of the other and everything works without the theme.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from django import forms
    from django.contrib import admin
    from django.contrib.auth.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
    from django.forms import CheckboxInput, CheckboxSelectMultiple, EmailInput, PasswordInput, Select, TextInput

    ModelForm: TypeAlias = forms.ModelForm[Any]
    ModelAdmin: TypeAlias = admin.ModelAdmin[Any]
    TabularInline: TypeAlias = admin.TabularInline[Any, Any]
else:
    from django.forms import ModelForm
    from unfold.admin import ModelAdmin, TabularInline
    from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
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
]
